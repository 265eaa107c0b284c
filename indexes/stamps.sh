# The README's example: cut-out photos of 6 classes, encoded by EfficientNet-Lite0. Run this first, in the clone:
#   python benchmarks/demo.py --source debian --only-fetch
# Expected from `retrieval-tip evaluate indexes/stamps build/demo/new`: top1 0.89, n 80.
retrieval-tip index build build/demo/photos \
    --model timm:tf_efficientnet_lite0@build/demo/efficientnet-lite0.pth --out "${OUT:-indexes/stamps}" "$@"
