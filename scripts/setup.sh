#!/usr/bin/env bash
# Sets up the environments that the Makefile needs. It needs cargo, Python and a C compiler.
# A second call finds all done.
#
#   setup.sh python                 prints the interpreter that environments are made from
#   setup.sh python-ft              prints the free-threaded one, or nothing
#   setup.sh python-3NN             prints Python 3.NN, or nothing
#   setup.sh venv DIR GROUP...      makes DIR and installs requirements/GROUP.txt into it
#   setup.sh install DIR ARGUMENT... installs into an environment, with uv if it is there
#   setup.sh wheel DIR              builds the forebay wheel for DIR's interpreter and installs it, if sources changed
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
cache=${XDG_CACHE_HOME:-$HOME/.cache}/forebay
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$cache/target}

die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

# Tells whether a Python runs. A name on the PATH may be a shim that fails.
runs() { "$1" -c "import sys, venv, ensurepip; sys.exit(not ($2))" >/dev/null 2>&1; }

find_python() {
  local name
  for name in ${FOREBAY_PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
    runs "$name" 'sys.version_info >= (3, 11) and getattr(sys, "_is_gil_enabled", lambda: True)()' || continue
    "$name" -c 'import sys; print(sys.executable)'
    return
  done
  die "no Python >= 3.11 with venv found: tried ${FOREBAY_PYTHON:-python3 and python3.11 to python3.14 on the PATH};" \
    "install one (Debian: python3 python3-venv) or name it in FOREBAY_PYTHON"
}

find_python_ft() {
  local name
  for name in ${FOREBAY_PYTHON_FT:-python3.14t "$cache/py314t/bin/python3.14t" "$HOME/.cache/forebay/py314t/bin/python3.14t"}; do
    runs "$name" 'sys.version_info >= (3, 14) and not sys._is_gil_enabled()' || continue
    "$name" -c 'import sys; print(sys.executable)'
    return
  done
}

# Finds a version that a measurement needs. workers.py needs 3.12, some peers need 3.13 or newer.
find_python_version() { # 3NN
  local name version=3.${1#3}
  for name in "python$version" "$HOME"/.pyenv/versions/"$version"*/bin/"python$version"; do
    runs "$name" "sys.version_info[:2] == (3, ${1#3})" || continue
    "$name" -c 'import sys; print(sys.executable)'
    return
  done
}

# Finds uv, which installs in seconds; pip takes minutes. Without uv everything still works.
find_uv() {
  command -v uv && return
  [ -x .venv-uv/bin/uv ] && echo .venv-uv/bin/uv && return
  { "$(find_python)" -m venv .venv-uv && .venv-uv/bin/pip install --quiet uv; } >/dev/null 2>&1 || return 0
  echo .venv-uv/bin/uv
}

install() { # DIR ARGUMENT...
  local dir=$1 uv
  shift
  uv=$(find_uv)
  if [ -n "$uv" ] && "$uv" pip install --quiet --python "$dir/bin/python" "$@"; then return; fi
  "$dir/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}

make_venv() { # DIR GROUP...
  local dir=$1 group stamp python missing=()
  shift
  if [ ! -x "$dir/bin/python" ]; then
    case $dir in
      *-ft) python=$(find_python_ft) ;;
      *-3[0-9][0-9]) python=$(find_python_version "${dir##*-}") ;;
      *) python=$(find_python) ;;
    esac
    [ -n "$python" ] || case $dir in
      *-ft) die "no free-threaded Python found: put python3.14t on the PATH or name it in FOREBAY_PYTHON_FT" ;;
      *) die "no Python for $dir found on the PATH or in ~/.pyenv/versions" ;;
    esac
    echo "setup: $dir from $python" >&2
    "$python" -m venv "$dir"
  fi
  for group in "$@"; do
    stamp=$dir/.has-$group
    cmp -s "requirements/$group.txt" "$stamp" || missing+=("$group")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  echo "setup: installing ${missing[*]} into $dir, once; torch takes some GB" >&2
  # shellcheck disable=SC2046
  install "$dir" $(printf -- '-r requirements/%s.txt ' "${missing[@]}")
  for group in "${missing[@]}"; do cp "requirements/$group.txt" "$dir/.has-$group"; done
}

# Prints the hash of a wheel's sources and tools.
source_hash() {
  {
    find Cargo.toml Cargo.lock loader remote service cli bindings -type f \
      \( -name '*.rs' -o -name '*.toml' -o -name '*.lock' -o -name '*.py' -o -name '*.pyi' -o -name '*.md' -o -name '*.html' -o -name py.typed \) \
      -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
    "$1/bin/python" -VV
    cargo --version
    echo "${FOREBAY_WHEEL_PROFILE:-release}"
  } | sha256sum
}

make_wheel() { # DIR
  local dir=$1 hash tag out
  [ -x "$dir/bin/python" ] || die "$dir does not exist yet"
  [ -d "$HOME/.cargo/bin" ] && PATH=$PATH:$HOME/.cargo/bin
  cargo --version >/dev/null 2>&1 || die "no working cargo found: install Rust with rustup, then \`rustup default stable\`"
  hash=$(source_hash "$dir")
  [ "$hash" = "$(cat "$dir/.has-wheel" 2>/dev/null)" ] && return
  make_venv .venv build
  tag=$("$dir/bin/python" -c 'import sysconfig; print(sysconfig.get_config_var("SOABI"))')
  out=out/wheels/$tag
  rm -rf "$out"
  echo "setup: compiling forebay for $dir; the first time takes some 5 minutes on 2 cores" >&2
  # FOREBAY_WHEEL_PROFILE=dev compiles in a third of the time, for work on the code.
  .venv/bin/maturin build --profile "${FOREBAY_WHEEL_PROFILE:-release}" --quiet --manifest-path bindings/Cargo.toml \
    --interpreter "$dir/bin/python" --out "$out" >&2
  install "$dir" --no-deps --force-reinstall "$out"/*.whl
  echo "$hash" >"$dir/.has-wheel"
  echo "setup: installed $(basename "$out"/*.whl) into $dir" >&2
}

command=${1:-}
shift || true
case $command in
  python) find_python ;;
  python-ft) find_python_ft ;;
  python-3[0-9][0-9]) find_python_version "${command#python-}" ;;
  venv) make_venv "$@" ;;
  install) install "$@" ;;
  wheel) make_wheel "$@" ;;
  *) die "expected \`python\`, \`python-ft\`, \`python-3NN\`, \`venv DIR GROUP...\`, \`install DIR ARGUMENT...\` or \`wheel DIR\`, found \`$command\`" ;;
esac
