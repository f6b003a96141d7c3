"""The zoo: the BatchNorm families of model libraries, each converted, trained for two windows, and reverted."""
