#!/usr/bin/env bash
# Joins the pieces that have arrived in this folder, into $DLM_HOME, and runs stages of benchmarks.gpu there.
#
#   ./run.sh                                   # joins what is there, and no more
#   ./run.sh --stage train=4 r2ft=1 eval=2     # and runs stages; options as for python -m benchmarks.gpu
#
# Pieces may come in several deliveries: each call joins what is complete. Nothing outside $DLM_HOME is touched.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
home=${DLM_HOME:-$here/home}
python=${PYTHON:-python3}
mkdir -p "$home/pieces" "$home/cache"
find "$here" -maxdepth 1 -type f -exec cp -f {} "$home/pieces/" \;
cd "$home/pieces"

whole() {  # whether all pieces of $1 are here, by pieces.json
  "$python" - "$1" <<'PY'
import json, pathlib, sys
sums = json.loads(pathlib.Path("pieces.json").read_text())
own = sums.get(sys.argv[1])
sys.exit(own is None or not all(pathlib.Path(f"{sys.argv[1]}.{i:02d}").is_file() for i in range(own["pieces"])))
PY
}

# A later delivery may bring another repository: pieces.json tells.
digest=$("$python" -c 'import json; print(json.load(open("pieces.json"))["repository.tar.gz"]["sha256"])')
if [ "$digest" != "$(cat "$home/repository.sha256" 2>/dev/null)" ] && whole repository.tar.gz; then
  rm -rf "$home/repository.part" "$home/repository"
  mkdir -p "$home/repository.part"
  cat repository.tar.gz.* | tar -xz -C "$home/repository.part"
  mv "$home/repository.part" "$home/repository"
  echo "$digest" > "$home/repository.sha256"
fi
[ -d "$home/repository" ] || { echo "run.sh: the repository's pieces have not arrived" >&2; exit 1; }
cd "$home/repository"
join() { "$python" -m benchmarks.gpu.pieces "$home/pieces" "$1" --output "$2"; }

cd "$home/pieces"
if [ ! -d "$home/site" ] && whole wheels.tar; then
  (cd "$home/repository" && join wheels.tar "$home/wheels")
  install() { "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$home/site" "$@"; }
  install "$home"/wheels/*.whl || for wheel in "$home"/wheels/*.whl; do
    install "$wheel" || echo "run.sh: done without $(basename "$wheel")" >&2
  done
fi
if whole adapters.tar; then
  (cd "$home/repository" && join adapters.tar "$home/repository")
fi
export PYTHONPATH="$home/repository${PYTHONPATH:+:$PYTHONPATH}:$home/site"
export DLM_CACHE="$home/cache" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
if [ ! -d "$home/cache/smollm2-135m-instruct" ] && whole base.gguf; then
  cat base.gguf.* > "$home/base.gguf"
  (cd "$home/repository" && "$python" -m dlm.pretrained.base "$home/base.gguf")
  rm -f "$home/base.gguf"
fi
[ $# -gt 0 ] || exit 0
given=()
[ -f rows.npz ] && given+=(--rows "$home/pieces/rows.npz")
[ -f questions.json ] && given+=(--questions "$home/pieces/questions.json")
cd "$home/repository"
exec "$python" -m benchmarks.gpu --output "$home/run" "${given[@]}" "$@"
