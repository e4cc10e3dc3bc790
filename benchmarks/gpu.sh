#!/bin/sh
# What does this project do on one GPU? Tests, every benchmark and a short training run, in 10 to 20 minutes.
#
#     sh benchmarks/gpu.sh                  # results in runs/gpu, tables in benchmarks/RESULTS.md
#     OUT=/elsewhere sh benchmarks/gpu.sh
#
# Wants the virtual environment (`make install`) with a CUDA build of torch. Goes on when a part fails, and says so.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
OUT=${OUT:-runs/gpu}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
failed=""

# part NAME SECONDS COMMAND...: runs a command with a time limit; its output goes to the screen and to $OUT/NAME.log.
part() {
    name=$1 limit=$2
    shift 2
    echo "== $name: $*"
    begin=$(date +%s)
    { timeout "$limit" "$@" 2>&1; echo $? >"$OUT/$name.code"; } | tee "$OUT/$name.log"
    code=$(cat "$OUT/$name.code")
    echo "== $name: exit code $code after $(($(date +%s) - begin)) s"
    [ "$code" = 0 ] || failed="$failed $name"
}

"$PYTHON" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "torch finds no CUDA device")' || exit 2
nvidia-smi >"$OUT/nvidia-smi.txt" 2>&1
"$PYTHON" -m pip freeze >"$OUT/packages.txt" 2>/dev/null

# Every kernel compiles once; processes share the work.
part tests 420 "$PYTHON" -m pytest -m "gpu and not slow" --numprocesses 8 tests
part attention 600 "$PYTHON" benchmarks/attention.py --json "$OUT/attention.json"
part train_step 300 "$PYTHON" benchmarks/train_step.py --json "$OUT/train_step.json"
part train_step_no_recomputation 300 "$PYTHON" benchmarks/train_step.py \
    --name imagenet64_big_no_recomputation --set train.micro_batch_images=1 \
    --set train.activation_checkpoint_every_layers=0 --json "$OUT/train_step_no_recomputation.json"
part train_step_compiled 300 "$PYTHON" benchmarks/train_step.py --name imagenet64_big_compiled \
    --set train.micro_batch_images=1 --set train.compile=true \
    --set train.activation_checkpoint_every_layers=0 --json "$OUT/train_step_compiled.json"
part train_step_2d 300 "$PYTHON" benchmarks/train_step.py --name imagenet64_big_2d \
    --set model.attention=local_2d --set "model.attention.query_block=[8, 32]" --set "model.attention.memory=[8, 16]" \
    --json "$OUT/train_step_2d.json"
if [ -f benchmarks/sampling.py ]; then
    part sampling 300 "$PYTHON" benchmarks/sampling.py --json "$OUT/sampling.json"
fi

# The large model on real photographs through the launcher: packing, training, checkpoint, evaluation.
for split in train validation; do
    [ -f "$OUT/photographs/$split/manifest.json" ] || part "pack_$split" 120 "$PYTHON" -m data_pipeline.pack \
        --source photographs --dest "$OUT/photographs/$split" --size 64 --split $split --images 1024
done
part train 400 deepspeed --quiet --num_gpus 1 trainer/run.py --config configs/imagenet64_big.yaml \
    --set "run.dir=$OUT/train" --set "tracking.uri=sqlite:///$OUT/mlflow.db" \
    --set "data.train_url=$OUT/photographs/train" --set "data.validation_url=$OUT/photographs/validation" \
    --set train.steps=30 --set train.global_batch_images=16 --set train.log_every_steps=10 \
    --set optimizer.schedule.warmup_steps=10 --set optimizer.schedule.decay_steps=10 \
    --set evaluate.images=64 --set evaluate.every_steps=30 --set checkpoint.every_steps=30

echo "== results: $OUT; tables: benchmarks/RESULTS.md"
[ -z "$failed" ] || { echo "== failed:$failed"; exit 1; }
