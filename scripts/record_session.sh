#!/usr/bin/env bash
# record_session.sh RUN OUT.svg: records the terminal session of the README as an animated picture.
# RUN is a trainer's folder with actor models in global_step_100 and global_step_200. Needs asciinema 2 (PyPI),
# svg-term-cli (npm) and streamconv on the PATH.
set -euo pipefail
run=$(realpath "$1") out=$(realpath -m "$2")
work=/tmp/verl
mkdir "$work"
trap 'rm -rf "$work"' EXIT
ln -s "$run" "$work/run"
export STREAMCONV_CACHE=$work/cache # the first conversion is one

cat > "$work/session.sh" <<'SESSION'
cd "$(dirname "$0")"
type_in() {
    printf '\033[32m$\033[0m '
    for ((i = 0; i < ${#1}; i++)); do
        printf '%s' "${1:i:1}"
        sleep 0.03
    done
    sleep 0.4
    printf '\n'
    eval "$1"
    sleep 1.5
}
type_in 'ls run/global_step_100/actor'
type_in 'streamconv run/global_step_100/actor model-100 --max-mem 512MB'
type_in 'streamconv run/global_step_200/actor model-200 --max-mem 100MB'
type_in 'ls model-200'
type_in 'streamconv verify model-200 --source run/global_step_200/actor'
sleep 3
SESSION

asciinema rec --quiet --overwrite --cols 96 --rows 26 --idle-time-limit 2 \
    --command "bash $work/session.sh" "$work/session.cast"
svg-term --in "$work/session.cast" --out "$out" --window --no-cursor
