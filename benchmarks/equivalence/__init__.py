"""The experiment: does accumulation train the network that the large batch trains? One package, one command."""
