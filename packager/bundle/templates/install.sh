#!/bin/sh
# Installs this bundle on this box; needs no network and no rights beyond the folder it installs to.
# Usage: ./install.sh [--check | --facts] [--prefix DIR] [--python PYTHON] [--skip-engine]
set -eu
bundle='@BUNDLE@'
python_min='@PYTHON_MIN@'
python_max='@PYTHON_MAX@'

usage() {
    cat <<EOF
Usage: ./install.sh [--check | --facts] [--prefix DIR] [--python PYTHON] [--skip-engine]

Checks this box, then installs $bundle. Nothing is written before the check has passed.

  --check          only check this box and the files, line by line; nothing is installed
  --facts          only print this box's facts as JSON, to compare them elsewhere
  --prefix DIR     where to install (default: \$HOME/.local/opt/$bundle)
  --python PYTHON  the Python to use, $python_min to $python_max (default: the first fitting one on the PATH)
  --skip-engine    TensorRT on a Jetson: leave building the engine to the first start

Exit codes: 0 installed, 2 usage, 4 the box does not fit, 5 the bundle is damaged, 9 the machine failed.
EOF
}

refuse() {
    printf '%s\n' "$2" >&2
    exit "$1"
}

# The minor version of a Python, "3.10", by code that every Python can read; empty when it cannot be started.
version() {
    "$1" -c 'import sys; sys.stdout.write("%d.%d" % sys.version_info[:2])' 2>/dev/null || :
}

fits() {
    case $1 in 3.*) ;; *) return 1 ;; esac
    [ "${1#3.}" -ge "${python_min#3.}" ] && [ "${1#3.}" -le "${python_max#3.}" ]
}

prefix=
python=
verb=install
skip=
while [ $# -gt 0 ]; do
    case $1 in
        --prefix | --python)
            [ $# -ge 2 ] || refuse 2 "$1 needs a value; see ./install.sh --help."
            if [ "$1" = --prefix ]; then prefix=$2; else python=$2; fi
            shift 2 ;;
        --prefix=*) prefix=${1#*=}; shift ;;
        --python=*) python=${1#*=}; shift ;;
        --check | --facts) verb=${1#--}; shift ;;
        --skip-engine) skip=--skip-engine; shift ;;
        -h | --help) usage; exit 0 ;;
        *) refuse 2 "Unknown option $1; see ./install.sh --help." ;;
    esac
done

[ "$verb" = install ] || skip=
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd -P)
if [ -z "$prefix" ]; then
    [ -n "${HOME:-}" ] || refuse 2 "HOME is not set; say where to install with --prefix DIR."
    prefix=$HOME/.local/opt/$bundle
fi

if [ -z "$python" ]; then
    seen=
    minor=${python_max#3.}
    for candidate in python3 python; do
        found=$(version "$candidate")
        seen=${seen:-${found:+Python $found}}
        if [ -z "$python" ] && fits "$found"; then python=$candidate; fi
    done
    while [ -z "$python" ] && [ "$minor" -ge "${python_min#3.}" ]; do
        found=$(version "python3.$minor")
        if fits "$found"; then python=python3.$minor; fi
        minor=$((minor - 1))
    done
    if [ -z "$python" ]; then # the check runs on Python 3.8 too, and tells what is wrong with the whole box
        found=$(version python3)
        case $found in 3.*) [ "${found#3.}" -lt 8 ] || python=python3 ;; esac
    fi
    [ -n "$python" ] || refuse 4 "Python: expected Python $python_min to $python_max, found ${seen:-none}; \
install one of them beside the system's own and name it with --python."
else
    found=$(version "$python")
    fits "$found" || refuse 4 "Python: expected Python $python_min to $python_max, found ${found:-nothing that starts} at \
$python; name another one with --python."
fi

# The installer's own code is checked before it runs; it then checks everything else. -B: the bundle stays as it is.
exec "$python" -I -B -c '
import hashlib, os, sys
home, verb = sys.argv.pop(1), sys.argv.pop(1)
damaged = None
try:
    with open(os.path.join(home, "SHA256SUMS"), "rb") as lines:
        sums = [line.decode("utf-8").rstrip("\n").partition("  ") for line in lines]
    for digest, _, path in sums:
        if path.startswith("runtime/"):
            damaged = path
            with open(os.path.join(home, *path.split("/")), "rb") as stream:
                if hashlib.sha256(stream.read()).hexdigest() != digest:
                    raise ValueError("its sha256 differs")
    damaged = None if any(path == "runtime/runtimes/install/install.py" for _, _, path in sums) else "runtime/runtimes/install/install.py"
    reason = "it is not listed"
except (OSError, ValueError) as error:
    damaged, reason = damaged or "SHA256SUMS", str(error)
if damaged:
    sys.stderr.write("%s: expected the file that was bundled, found another (%s); copy the bundle again.\n"
                     % (damaged, reason))
    sys.exit(5)
sys.path.insert(0, os.path.join(home, "runtime"))
if verb == "install":
    from runtimes.install.install import main
else:
    from runtimes.preflight.check import main
sys.exit(main(sys.argv[1:] + ["--facts-only"] * (verb == "facts")))
' "$here" "$verb" --bundle "$here" --prefix "$prefix" ${skip:+"$skip"}
