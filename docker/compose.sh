#!/usr/bin/env bash
# docker compose, or docker-compose where that is what there is, with the cluster of compose.yaml.
set -euo pipefail

file=$(dirname "$0")/compose.yaml
if docker compose version >/dev/null 2>&1; then
  exec docker compose --file "$file" "$@"
elif command -v docker-compose >/dev/null; then
  exec docker-compose --file "$file" "$@"
fi
echo "compose.sh: error: neither 'docker compose' nor docker-compose is installed: docker/engine.sh installs one" >&2
exit 2
