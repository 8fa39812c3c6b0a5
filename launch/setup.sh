#!/bin/sh
# Make the virtual environment in .venv (or $VENV) and install the project in it with the extras that $EXTRAS names, such
# as "test". Done once; again when setup.cfg changes. Sourced by the other scripts, which then use "$VENV/bin/python".
#   PYTHON   the interpreter to build it with, 3.11 or newer; by default the first that is found

VENV="${VENV:-.venv}"
extras="${EXTRAS:-}"
new_enough='import sys; sys.exit(sys.version_info < (3, 11))'

if [ ! -x "$VENV/bin/python" ] || ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
        if "$candidate" -c "$new_enough" 2>/dev/null; then found="$candidate"; break; fi
    done
    if [ -z "${found:-}" ]; then
        echo "error: no Python 3.11 or newer found (${PYTHON:-python3}); install one, or name it: PYTHON=/path/to/python sh $0" >&2
        exit 2
    fi
    if ! "$found" -m venv --clear "$VENV"; then
        echo "error: $found cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2
        exit 2
    fi
fi

stamp="$VENV/.installed-${extras:-base}"
if [ ! -e "$stamp" ] || [ setup.cfg -nt "$stamp" ]; then
    echo "installing ldm_jax${extras:+[$extras]} in $VENV, once" >&2
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -e ".${extras:+[$extras]}" || {
        echo "error: the installation failed; see the lines above (it needs a package index)" >&2
        exit 2
    }
    touch "$stamp"
fi
