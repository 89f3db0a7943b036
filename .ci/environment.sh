# Sourced by the scripts that set themselves up: `environment EXTRAS` makes .venv hold the project
# with these extras, at the versions of constraints.txt, and puts its commands on the PATH.
# Nothing is installed where nothing changed.
environment() {
  local stamp=.venv/installed-$1 wanted
  wanted=$(cat pyproject.toml .ci/constraints.txt | cksum)
  if [[ ! -f $stamp || $(<"$stamp") != "$wanted" ]]; then
    install_environment "$1"
    echo "$wanted" >"$stamp"
  fi
  export PATH=$PWD/.venv/bin:$PATH
}

install_environment() {
  if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "python3 must be 3.11 or newer" >&2
    return 1
  fi
  if ! command -v c++ g++ clang++ >/dev/null; then
    echo "torch.compile needs a C++ compiler: install g++ or clang++" >&2
    return 1
  fi
  if ! .venv/bin/python -m pip --version &>/dev/null; then
    python3 -m venv --clear .venv
  fi
  .venv/bin/python -m pip install --constraint .ci/constraints.txt --editable ".[$1]"
}
