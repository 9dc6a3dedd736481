#!/bin/sh
# Install this project and everything it needs into a virtual environment.
#
#   sh launch/install.sh [--venv DIR] [--extras test,eval] [--only-dependencies]
#
# Without --venv the active virtual environment is used, or .venv beside this folder, created if need be. A torch that
# is already there is kept, whatever its version. Repeating a finished install takes a fraction of a second.
# --only-dependencies needs no source code, and leaves the project itself to a later install: for a layer of an image.
# Details and choices: docs/install.md.
set -eu

MEGABLOCKS="megablocks==0.10.0"
STK="stanford-stk==0.7.1"
CUDA_ARCHITECTURES="8.0;9.0;10.0"

say() { printf 'install: %s\n' "$*"; }
die() {
    printf 'install: error: %s\n' "$*" >&2
    exit 1
}

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
venv=${VIRTUAL_ENV:-$root/.venv}
extras=
only_dependencies=
while [ $# -gt 0 ]; do
    case $1 in
        --venv) [ $# -gt 1 ] || die "--venv needs a directory"; venv=$2; shift 2 ;;
        --venv=*) venv=${1#*=}; shift ;;
        --extras) [ $# -gt 1 ] || die "--extras needs a list such as test,eval"; extras=$2; shift 2 ;;
        --extras=*) extras=${1#*=}; shift ;;
        --only-dependencies) only_dependencies=1; shift ;;
        -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) die "unknown argument '$1'; usage: sh launch/install.sh [--venv DIR] [--extras test,eval]" \
            "[--only-dependencies]" ;;
    esac
done
python=$venv/bin/python
stamp=$venv/.gptoss_dist-installed

is_supported() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
        if is_supported "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    die "Python 3.11 or newer is needed; found $(python3 --version 2>&1 || echo none)"
}

create_venv() {
    base=$(find_python) || exit 1
    "$base" -c 'import venv, ensurepip' 2>/dev/null || die "$base cannot create virtual environments; on Debian and" \
        "Ubuntu: sudo apt install $("$base" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
    say "creating $venv with $("$base" --version)"
    "$base" -m venv "$venv" || die "$base -m venv $venv failed; remove $venv and try again"
}

# Values of a pip setting (index-url, extra-index-url, find-links, cert) from its files and environment, one per word.
pip_setting() { "$python" -m pip config list 2>/dev/null | sed -n "s/^[^=]*\.$1='\(.*\)'\$/\1/p" | sed 's/\\n/ /g'; }

# uv does not read pip's settings: hand them on where uv has none of its own.
configure_uv() {
    first() { pip_setting "$1" | head -n 1; }
    words() { pip_setting "$1" | tr -s ' ' '\n' | sed '/^$/d' | sort -u | paste -s -d "$2" -; }
    : "${UV_FIND_LINKS:=$(words find-links ,)}" "${UV_INDEX:=$(words extra-index-url ' ')}"
    : "${UV_DEFAULT_INDEX:=$(first index-url)}" "${SSL_CERT_FILE:=$(first cert)}"
    for name in UV_FIND_LINKS UV_INDEX UV_DEFAULT_INDEX SSL_CERT_FILE; do
        if eval "[ -n \"\$$name\" ]"; then export "${name?}"; else unset "$name"; fi
    done
    # pip looks for the best version on every index; uv by default stops at the first index that has the name.
    export UV_INDEX_STRATEGY="${UV_INDEX_STRATEGY:-unsafe-best-match}"
}

# uv is faster than pip, but is not used where pip is to use no index.
find_uv() {
    uv=$(command -v uv || true)
    [ -z "$(pip_setting no-index)" ] || uv=
}

pip_install() {
    if [ -n "$uv" ]; then
        "$uv" pip install --quiet --python "$python" "$@"
    else
        "$python" -m pip install --quiet --disable-pip-version-check --no-compile "$@"
    fi
}

package_version() {
    "$python" -c 'import importlib.metadata as m, sys; print(m.version(sys.argv[1]))' "$1" 2>/dev/null || true
}

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }

# Versions to hold to: the tested ones, except that a torch which is already there stays, with the Triton it brought.
write_constraints() {
    torch=$(package_version torch)
    constraints=$venv/constraints.txt
    if [ -z "$torch" ] || [ "${torch%%+*}" = "$(sed -n 's/^torch==//p' "$root/launch/constraints.txt")" ]; then
        cp "$root/launch/constraints.txt" "$constraints"
    else
        say "keeping torch $torch, which is not the tested version"
        sed -e "s/^torch==.*/torch==${torch%%+*}/" -e '/^triton==/d' "$root/launch/constraints.txt" >"$constraints"
    fi
}

# uv knows where PyTorch publishes its CPU builds; pip has to be told.
install_torch_by_uv() {
    if [ -z "$uv" ]; then
        "$python" -m pip install --quiet --disable-pip-version-check uv || return 1
        configure_uv
    fi
    "${uv:-$venv/bin/uv}" pip install --quiet --python "$python" --torch-backend cpu -c "$constraints" "$wanted"
}

install_torch() {
    wanted=$(grep '^torch==' "$root/launch/constraints.txt")
    if [ -n "$torch" ]; then
        say "torch $torch is there already"
    elif has_gpu; then
        say "installing $wanted with CUDA (about 3 GB of downloads)"
        pip_install -c "$constraints" "$wanted" || die "torch did not install; see the message above"
    else
        # The +cpu tag never matches a CUDA wheel, so nothing large is fetched by accident.
        say "no NVIDIA GPU found: installing $wanted for CPU"
        pip_install -c "$constraints" "$wanted+cpu" 2>/dev/null ||
            install_torch_by_uv ||
            die "no CPU build of $wanted was found; install one into $venv by hand, then run this again"
    fi
    torch=$(package_version torch)
}

# The CUDA toolkit of the same major version as torch's, whose headers and compiler match; empty if there is none.
find_toolkit() {
    [ -n "$torch_cuda" ] || return 0
    nvcc=$(command -v nvcc || true)
    for home in "${CUDA_HOME:-}" "/usr/local/cuda-$torch_cuda" /usr/local/cuda "${nvcc%/bin/nvcc}"; do
        if [ -x "$home/bin/nvcc" ] && [ -f "$home/include/cuda_runtime.h" ] &&
            "$home/bin/nvcc" --version | grep -q "release ${torch_cuda%%.*}\."; then
            echo "$home"
            return
        fi
    done
}

# megablocks' metadata asks for torch 2.7 and its build would fetch one: hence no dependencies and no isolation. Not from
# a wheel cache either, where a build without the CUDA extension has the same name as one with it.
install_megablocks() {
    torch_cuda=$("$python" -c 'import torch; print(torch.version.cuda or "")')
    toolkit=$(find_toolkit)
    set -- --no-deps --no-build-isolation "$STK" "$MEGABLOCKS"
    if [ -n "$uv" ]; then set -- --no-cache --reinstall "$@"; else set -- --no-cache-dir --force-reinstall "$@"; fi
    if [ -n "$toolkit" ]; then
        say "installing $MEGABLOCKS with its CUDA extension, compiled with $toolkit (minutes)"
        detected=$("$python" -c 'import torch as t; print("%d.%d" % t.cuda.get_device_capability() if t.cuda.is_available() else "")')
        if pip_install ninja && CUDA_HOME=$toolkit TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-${detected:-$CUDA_ARCHITECTURES}} \
            NVCC_PREPEND_FLAGS="-include $root/launch/mb_cuda13_compat.h ${NVCC_PREPEND_FLAGS:-}" pip_install "$@"; then
            return
        fi
        say "the CUDA extension did not compile: going on without it (torch does its part)"
    elif [ -n "$torch_cuda" ]; then
        say "installing $MEGABLOCKS without its CUDA extension: no CUDA ${torch_cuda%%.*} toolkit found (torch does its part)"
    else
        say "installing $MEGABLOCKS"
    fi
    # Its setup.py compiles with whatever toolkit it finds, suitable or not: hide them all.
    hide=$(mktemp -d)
    [ -z "$torch_cuda" ] || echo 'import torch.utils.cpp_extension as c; c.CUDA_HOME = None' >"$hide/sitecustomize.py"
    status=0
    PYTHONPATH=$hide pip_install "$@" || status=$?
    rm -r "$hide"
    [ $status -eq 0 ] || die "$MEGABLOCKS did not install; see the message above"
}

# The dependencies of the project and of its extras, one per line. pip itself takes them only together with the project.
requirements() {
    "$python" -c '
import configparser, sys
setup = configparser.ConfigParser()
setup.read(sys.argv[1])
print(setup["options"]["install_requires"])
for extra in filter(None, sys.argv[2].split(",")):
    print(setup["options.extras_require"][extra])' "$root/setup.cfg" "$extras" 2>/dev/null
}

# What the installed state depends on.
digest() {
    { cat "$root/setup.cfg" "$root/pyproject.toml" "$root/launch/constraints.txt" "$root/launch/install.sh"
      echo "$root" "$(package_version torch)" "$(package_version megablocks)"; } | cksum
}

is_installed() {
    [ "$(head -n 1 "$stamp" 2>/dev/null)" = "$(digest)" ] && { [ -z "$extras" ] || grep -qxF "$extras" "$stamp"; }
}

# Python compiles a package when it is first imported and keeps the result, except where this variable forbids it, as in
# many containers: there every start of a process would compile torch again, for seconds. Some packages hold files that
# are no valid Python, which is not an error of ours.
compile_packages() {
    [ -n "${PYTHONDONTWRITEBYTECODE:-}" ] || return 0
    say "compiling the packages, since PYTHONDONTWRITEBYTECODE keeps Python from doing so later (a minute)"
    "$python" -m compileall -q -j 0 "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" >/dev/null 2>&1 || true
}

# The digest of what is installed, then the sets of extras installed under it.
write_stamp() {
    [ "$(head -n 1 "$stamp" 2>/dev/null)" = "$(digest)" ] || digest >"$stamp"
    echo "$extras" >>"$stamp"
}

[ -x "$python" ] || create_venv
is_supported "$python" || die "$venv holds $("$python" --version 2>&1); Python 3.11 or newer is needed"
if is_installed; then
    say "nothing to do: $venv is up to date"
    exit 0
fi
find_uv
if [ -n "$uv" ]; then
    say "using $uv"
    configure_uv
else
    "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null || die "$venv has no pip"
fi
write_constraints
pip_install "setuptools>=77.0.3" wheel packaging || die "the build tools did not install; see the message above"
install_torch
# DeepSpeed compiles what it needs at first use; its build would otherwise look for a CUDA toolkit.
export DS_BUILD_OPS="${DS_BUILD_OPS:-0}"
if [ -n "$only_dependencies" ]; then
    say "installing the dependencies of gptoss_dist${extras:+[$extras]}"
    requirements >"$venv/requirements.txt" || die "no such extra in setup.cfg: $extras"
    set -- -r "$venv/requirements.txt"
else
    say "installing gptoss_dist${extras:+[$extras]} and its dependencies"
    set -- -e "$root${extras:+[$extras]}"
fi
pip_install -c "$constraints" --no-build-isolation "$@" triton ||
    die "the dependencies did not install; see the message above"
if [ "$(package_version megablocks)" = "${MEGABLOCKS#*==}" ] && [ "$(cat "$venv/.megablocks-torch" 2>/dev/null)" = "$torch" ]; then
    say "$MEGABLOCKS is there already"
else
    install_megablocks
    echo "$torch" >"$venv/.megablocks-torch"
fi
if [ -n "$only_dependencies" ]; then
    compile_packages
    say "done: $venv has all that gptoss_dist needs"
    exit 0
fi
"$python" -c 'from gptoss_dist.parallel.megablocks_compat import load_megablocks; load_megablocks()' ||
    die "everything is installed but does not import; see the message above"
compile_packages
write_stamp
say "done: . $venv/bin/activate"
