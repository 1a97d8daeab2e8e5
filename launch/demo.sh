#!/bin/sh
# 3-D VSD with the embedded prior on two ranks, through the paper's three stages: eight particles of "a red cube", and eight
# of "an object", which can be any colour and shape. All are exported as GLB.
#
#   sh launch/demo.sh DIR [key=value ...]        `make demo` installs everything and calls it with DIR=runs/demo
#
# A second call continues an interrupted demo. If the demo in DIR is finished, it makes a new one in DIR-2, DIR-3, ...
set -eu

if [ $# -lt 1 ]; then
    echo "usage: sh launch/demo.sh DIR [key=value ...]" >&2
    exit 2
fi
asked=$1
shift
config=$(dirname "$0")/../configs/quickstart-mesh.yaml
began=$(date +%s)

folder=$asked
number=1
while [ -f "$folder/an-object/stages/3-texture/exports/particles.glb" ]; do
    number=$((number + 1))
    folder=$asked-$number
done

if [ "$(python -c 'import torch; print(torch.cuda.device_count())')" -lt 2 ]; then
    export ACCELERATE_USE_CPU=true # two ranks cannot share one GPU
fi
if [ -z "${OMP_NUM_THREADS:-}" ]; then
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
    OMP_NUM_THREADS=$((cores > 2 ? cores / 2 : 1))
fi
export OMP_NUM_THREADS

elapsed() {
    echo "$(($(date +%s) - began)) s"
}

# make_one NAME PROMPT [key=value ...]: trains or resumes the run unless it is done, then evaluates and exports it.
make_one() {
    run=$folder/$1
    prompt=$2
    shift 2
    echo "== \"$prompt\" on 2 ranks, into $run"
    torchrun --standalone --nproc-per-node 2 -m distvsd.train "$config" "run.dir=$run" "prompt=$prompt" \
        particles.count=8 "$@"
    distvsd evaluate "$run"
    distvsd export "$run" --texture 512
    echo "== $(elapsed)"
}

make_one a-red-cube "a red cube" "$@"
make_one an-object "an object" "$@"

echo
echo "Done in $(elapsed). Each row of these pictures is a particle, seen from eight sides:"
for run in "$folder"/*/stages/*; do
    echo "  $run/renders/contact-sheet.png"
done
echo "Files for Blender and others, each with all particles of a prompt:"
for run in "$folder"/*/stages/3-*; do
    echo "  $run/exports/particles.glb"
done
echo "Turntables: distvsd render $folder/an-object"
