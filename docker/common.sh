# What the scripts of this folder share; each sources it after its usage().
# shellcheck shell=bash

fail() { # MESSAGE [STATUS]
  echo "$(basename "$0"): error: $1" >&2
  exit "${2:-2}"
}

# Of a script that takes none: prints its usage where that is asked for.
take_no_arguments() { # "$@"
  case "${1:-}" in
    -h | --help)
      usage
      exit 0
      ;;
    "") ;;
    *) fail "$1 is not an argument: there are none (see --help)" ;;
  esac
}

engine_answers() {
  docker info >/dev/null 2>&1
}

need_engine() {
  engine_answers || fail "no container engine answers: docker/engine.sh installs and starts one"
}
