#!/usr/bin/env bash
# Measure what docs/comparing.md shows, into docs/benchmarks and the document. Needs root, ds-lvx in
# PATH, and a machine that does nothing else; twenty minutes on two cores.
#     sudo -E env "PATH=$PATH" bash launch/bench_compare.sh
#     sudo -E env "PATH=$PATH" bash launch/bench_compare.sh long short     (some of the comparisons)
#     sudo -E env "PATH=$PATH" bash launch/bench_compare.sh text           (not among the others)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

compare() {
  ds-lvx compare --ranks 4 --network 200mbit --output docs/benchmarks --document docs/comparing.md "$@"
}

# Few queries over many keys, on a slow network.
long() {
  compare --seqlen-q 64 --seqlen-kv 64K --warmup 1 --repeats 5
}

short() {
  compare --seqlen-q 256 --seqlen-kv 32K --warmup 1 --repeats 15
}

# The same without overlap, and with K and V projected again in backward or kept.
ablations() {
  compare --seqlen-q 256 --seqlen-kv 32K --methods lvx ring --no-overlap --repeats 5
  compare --seqlen-q 256 --seqlen-kv 32K --methods lvx --recompute --repeats 10
  compare --seqlen-q 256 --seqlen-kv 32K --methods lvx --features-dim 512 \
    --no-recompute --repeats 10
}

# As many queries as keys; and one image of 1,601 tokens.
even() {
  compare --seqlen-q 2K --seqlen-kv 2K --repeats 10
  compare --seqlen-q 64 --seqlen-kv 1601 --repeats 20
}

# Causal text in runs of neighbours and in zigzag pieces, by ring and lvx; eight minutes. Of two
# steps a median is the mean: one slow second of the machine would be in it.
text() {
  causal() {
    compare --visibility causal --orders contiguous zigzag --methods lvx-ring ring "$@"
  }
  causal --seqlen-q 2K --seqlen-kv 2K --warmup 1 --repeats 10
  causal --seqlen-q 8K --seqlen-kv 8K --heads 4 --warmup 1 --repeats 3
  causal --seqlen-q 32K --seqlen-kv 32K --heads 1 --warmup 1 --repeats 3
}

for part in "${@:-long short ablations even text}"; do
  for name in $part; do
    "$name"
  done
done
