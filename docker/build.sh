#!/usr/bin/env bash
# Builds the images with docker, podman or buildah, and tries each one: build.sh --help
set -euo pipefail

readonly UNAVAILABLE=69 USAGE=64
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
    cat <<'TEXT'
usage: docker/build.sh [OPTION…] [worker-cpu] [worker-cuda] [airflow]

Builds these images (default: all), and tries each: a tiny volume from input to verified output, the DAG of a volume.

  --registry PREFIX    where images go, such as ghcr.io/lab or localhost:5000; part of their names
  --push               push them there; log in before
  --tag TAG            default: version and git revision, such as 0.1.0-1a2b3c4d (-dirty with changes not committed)
  --engine NAME        docker, podman or buildah; default: the first of these that works
  --build-arg KEY=VAL  a build argument, such as PYTHON_IMAGE=…@sha256:…; can be repeated
  --no-smoke           don't try the images
  -h, --help           show this

Exit codes: 0 done, 64 wrong usage, 69 nothing that could build, else a build, a trial or a push failed.
TEXT
}

fail() {
    local code=$1
    shift
    printf 'error: %s\n' "$*" >&2
    exit "$code"
}

works() { command -v "$1" >/dev/null && "$1" info >/dev/null 2>&1; }

choose_engine() {
    local name found=""
    for name in ${engine:-docker podman buildah}; do
        if works "$name"; then
            engine=$name
            return
        fi
        if command -v "$name" >/dev/null; then
            found+=" $name is installed, but \"$name info\" fails: is its service running, and may you use it?"
        fi
    done
    fail "$UNAVAILABLE" "nothing here can build images: docker, podman or buildah is needed.$found" \
        "Without one, docker/check_recipe.py runs the images' installation steps in a folder."
}

build() { # NAME:TAG TARGET [VARIANT]
    local options=(--file docker/Dockerfile --target "$2" --tag "$1"
        --build-arg "VERSION=$version" --build-arg "REVISION=$revision")
    [ $# -lt 3 ] || options+=(--build-arg "VARIANT=$3")
    "$engine" build "${options[@]}" ${build_args[@]+"${build_args[@]}"} .
}

run_in() { # IMAGE OPTION… -- COMMAND…: runs a command in a new container, with our standard input
    local image=$1 options=() container code=0
    shift
    while [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    shift
    if [ "$engine" != buildah ]; then
        "$engine" run --rm --interactive ${options[@]+"${options[@]}"} "$image" "$@"
        return
    fi
    container=$(buildah from --pull-never "$image") # buildah's containers can't be read-only
    buildah run "$container" -- "$@" || code=$?
    buildah rm "$container" >/dev/null
    return "$code"
}

smoke() { # IMAGE TARGET
    echo "── trying $1"
    if [ "$2" = worker ]; then
        run_in "$1" -- python -m chunkflow_core --help </dev/null >/dev/null
        run_in "$1" --read-only --tmpfs /tmp -- python - <docker/smoke.py
    else
        run_in "$1" -- python - <docker/smoke_airflow.py
    fi
}

engine="" registry="" tag="" push=false try=true images=() build_args=()
while [ $# -gt 0 ]; do
    case $1 in
        --registry | --tag | --engine | --build-arg)
            [ $# -gt 1 ] || fail "$USAGE" "$1: a value is missing; see --help"
            case $1 in
                --registry) registry=${2%/}/ ;;
                --tag) tag=$2 ;;
                --engine) engine=$2 ;;
                --build-arg) build_args+=(--build-arg "$2") ;;
            esac
            shift
            ;;
        --push) push=true ;;
        --no-smoke) try=false ;;
        -h | --help)
            usage
            exit
            ;;
        worker-cpu | worker-cuda | airflow) images+=("$1") ;;
        *) fail "$USAGE" "$1: expected an option, worker-cpu, worker-cuda or airflow; see --help" ;;
    esac
    shift
done
case $engine in
    "" | docker | podman | buildah) ;;
    *) fail "$USAGE" "--engine $engine: expected docker, podman or buildah" ;;
esac
if $push && [ -z "$registry" ]; then
    fail "$USAGE" "--push: --registry says where to; it is missing"
fi
[ ${#images[@]} -gt 0 ] || images=(worker-cpu worker-cuda airflow)
choose_engine

version=$(sed -n 's/^version = //p' setup.cfg)
revision=$(git rev-parse --short=8 HEAD 2>/dev/null || echo unknown)
if [ -n "$(git status --porcelain 2>/dev/null)" ]; then
    revision+=-dirty
fi
tag=${tag:-$version-$revision}

built=()
for image in "${images[@]}"; do
    target=${image%%-*} variant=${image#"${image%%-*}"}
    name=${registry}chunkflow-$target:$tag$variant
    echo "── building $name with $engine"
    build "$name" "$target" ${variant:+"${variant#-}"}
    if $try; then
        smoke "$name" "$target"
    fi
    built+=("$name")
done
if $push; then
    for name in "${built[@]}"; do
        "$engine" push "$name"
    done
fi

printf '\nbuilt%s:\n' "$($push && echo ' and pushed')"
printf '  %s\n' "${built[@]}"
cat <<'TEXT'

Next: chunkflow-worker goes into the spec (runner: {kind: kubernetes, image: …}; -cuda where pods have GPUs),
chunkflow-airflow into the values of Airflow's chart (images.airflow.repository and .tag).
TEXT
if ! $push; then
    echo "Clusters pull from a registry: --registry PREFIX --push, or load the images into the nodes."
fi
