# Tip-Adapter as published: 16 shots per class, 10 views each, CLIP RN50, nothing fitted. You give the photos:
#   sh indexes/tip-adapter.sh PHOTOS --out indexes/NAME
# MODEL, SHOTS and VIEWS in the environment replace these values.
retrieval-tip index build --model "${MODEL:-RN50@openai}" --shots "${SHOTS:-16}" --seed 1 --views "${VIEWS:-10}" \
    --alpha 1 --beta 5.5 "$@"
