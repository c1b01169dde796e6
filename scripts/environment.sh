# Sourced by scripts/demo and scripts/test: a virtual environment with evalpool as pinned in constraints.txt.
# Afterwards the shell is in the repository's root and $PYTHON is the environment's interpreter.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${EVALPOOL_VENV:-.venv}
PYTHON=$VENV/bin/python

install() { # install ARGUMENTS…: installs evalpool, again only when what it asks for has changed
    local wanted installed=$VENV/.evalpool-installed
    wanted=$(sha256sum pyproject.toml constraints.txt; echo "$PWD" "$@")
    if [ -x "$PYTHON" ] && [ "$(cat "$installed" 2>/dev/null)" = "$wanted" ]; then return; fi
    echo "Setting up $VENV …"
    [ -x "$PYTHON" ] || python3 -m venv "$VENV"
    "$PYTHON" -m pip install -qq --upgrade "pip>=25.1"
    "$PYTHON" -m pip install -qq -c constraints.txt -e . "$@"
    echo "$wanted" > "$installed"
}
