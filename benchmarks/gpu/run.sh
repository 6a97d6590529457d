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

assemble() {  # joins the pieces of $1 into $2; fails where some are missing, damaged or of an older delivery
  "$python" - "$1" "$2" <<'PY'
import hashlib, json, pathlib, sys
name, target = sys.argv[1:]
own = json.loads(pathlib.Path("pieces.json").read_text()).get(name)
pieces = [pathlib.Path(f"{name}.{i:02d}") for i in range(own["pieces"] if own else 0)]
if own is None or not all(piece.is_file() for piece in pieces):
    sys.exit(1)
data = b"".join(piece.read_bytes() for piece in pieces)
if hashlib.sha256(data).hexdigest() != own["sha256"]:
    print(f"run.sh: the pieces of {name} are damaged, or not all of one delivery", file=sys.stderr)
    sys.exit(1)
pathlib.Path(target).write_bytes(data)
PY
}
digest() { "$python" -c 'import json, sys; print(json.load(open("pieces.json")).get(sys.argv[1], {}).get("sha256"))' "$1"; }
is_new() { [ "$(digest "$1")" != "$(cat "$home/$1.sha256" 2>/dev/null)" ]; }

# A later delivery may bring another repository: pieces.json tells.
if is_new repository.tar.gz && assemble repository.tar.gz "$home/repository.tar.gz"; then
  rm -rf "$home/repository.part" "$home/repository"
  mkdir -p "$home/repository.part"
  tar -xzf "$home/repository.tar.gz" -C "$home/repository.part"
  mv "$home/repository.part" "$home/repository"
  rm -f "$home/repository.tar.gz" "$home/adapters.tar.sha256"
  digest repository.tar.gz > "$home/repository.tar.gz.sha256"
fi
[ -d "$home/repository" ] || { echo "run.sh: the repository's pieces have not arrived" >&2; exit 1; }
if is_new wheels.tar && assemble wheels.tar "$home/wheels.tar"; then
  rm -rf "$home/wheels" "$home/site"
  mkdir -p "$home/wheels"
  tar -xf "$home/wheels.tar" -C "$home/wheels"
  rm -f "$home/wheels.tar"
  install() { "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$home/site" "$@"; }
  install "$home"/wheels/*.whl || for wheel in "$home"/wheels/*.whl; do
    install "$wheel" || echo "run.sh: done without $(basename "$wheel")" >&2
  done
  digest wheels.tar > "$home/wheels.tar.sha256"
fi
if is_new adapters.tar && assemble adapters.tar "$home/adapters.tar"; then
  tar -xf "$home/adapters.tar" -C "$home/repository"
  rm -f "$home/adapters.tar"
  digest adapters.tar > "$home/adapters.tar.sha256"
fi
export PYTHONPATH="$home/repository${PYTHONPATH:+:$PYTHONPATH}:$home/site"
export DLM_CACHE="$home/cache" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
if [ ! -d "$home/cache/smollm2-135m-instruct" ] && assemble base.gguf "$home/base.gguf"; then
  (cd "$home/repository" && "$python" -m dlm.pretrained.base "$home/base.gguf")
  rm -f "$home/base.gguf"
fi
[ $# -gt 0 ] || exit 0
given=()
[ -f rows.npz ] && given+=(--rows "$home/pieces/rows.npz")
[ -f questions.json ] && given+=(--questions "$home/pieces/questions.json")
cd "$home/repository"
exec "$python" -m benchmarks.gpu --output "$home/run" "${given[@]}" "$@"
