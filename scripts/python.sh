#!/bin/sh
# Prints the Python that makes .venv: $PYTHON if set, else python3 if it is 3.11 or newer, else the newest of 3.14 to 3.11.
fits() {
    command -v "$1" >/dev/null 2>&1 && "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}
for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.14}; do
    if fits "$candidate"; then
        command -v "$candidate"
        exit 0
    fi
done
echo "set-up stopped: no Python 3.11 or newer was found (looked for: ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.14})." >&2
echo "  why: packager's build side is written for 3.11; only the box may run 3.10." >&2
echo "  do:  install one, or name it: make PYTHON=/path/to/python3.12 ..." >&2
exit 1
