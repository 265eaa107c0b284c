# Tip-Adapter as published: 16 shots per class, 10 views each, CLIP RN50, nothing fitted. You give the photos:
#   sh indexes/tip-adapter.sh PHOTOS --out indexes/NAME
retrieval-tip index build --model RN50@openai --shots 16 --seed 1 --views 10 --alpha 1 --beta 5.5 "$@"
