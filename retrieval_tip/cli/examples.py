"""Two examples for each command, which its help and the reference show."""

from retrieval_tip.store.address import EXAMPLE

EXAMPLES = {
    "index build": [
        "index build photos --out indexes/things",
        "index build photos --model dinov2 --out indexes/things",
    ],
    "index info": ["index info indexes/things", "index info indexes/things --json"],
    "index list": ["index list", "index list /data/indexes --format json"],
    "index verify": ["index verify indexes/things", "index verify s3://bucket/things"],
    "index query": [
        'index query indexes/things "SELECT * FROM class_counts"',
        "index query indexes/things \"SELECT source FROM labels WHERE label = 'cat'\" --out cats.csv",
    ],
    "index add": ["index add indexes/things more", "index add indexes/things more --shots 16"],
    "index merge": ["index merge indexes/things indexes/others", "index merge indexes/all indexes/a indexes/b"],
    "index remove": [
        "index remove indexes/things --key-ids 3,17",
        "index remove indexes/things --where \"label = 'cat'\"",
    ],
    "index relabel": [
        "index relabel indexes/things cat --key-ids 3",
        "index relabel indexes/things cat --where \"source LIKE '%tabby%'\"",
    ],
    "index rename": [
        "index rename indexes/things cat tabby",
        "index rename indexes/things cat 'tabby cat' --encode",
    ],
    "index set": ["index set indexes/things --alpha 2 --beta 5.5", "index set indexes/things --dtype float16"],
    "index history": ["index history indexes/things", "index history indexes/things --format json"],
    "index rollback": ["index rollback indexes/things", "index rollback indexes/things 2"],
    "index gc": ["index gc indexes/things", "index gc indexes/things --keep 5"],
    "index clone": [
        "index clone indexes/things indexes/copy",
        f"index clone indexes/things {EXAMPLE}",
    ],
    "index export": [
        "index export indexes/things --out keys.parquet",
        "index export indexes/things --out keys.parquet --text text.parquet",
    ],
    "index audit": [
        "index audit indexes/things --out suspects.csv",
        "index audit indexes/things --apply suspects.csv",
    ],
    "label": ["label new --out indexes/things", "label new --out indexes/animals --classes cat,dog,owl"],
    "suggest": ["suggest inbox -n 20", "suggest inbox -n 20 --index indexes/things --out next.csv"],
    "find": ['find inbox "a red flower"', "find inbox photos/cat/1.jpg --index indexes/things"],
    "sort": ["sort indexes/things inbox --into sorted", "sort --undo --into sorted"],
    "encode": [
        "encode photos --out photos.parquet",
        "encode photos --model dinov2 --views 10 --out photos.parquet",
    ],
    "classify": [
        "classify indexes/things new/*.jpg --explain",
        "classify indexes/things new --top 3 --out answers.csv",
    ],
    "evaluate": ["evaluate indexes/things new", "evaluate indexes/things new --report things.html"],
    "compare": ["compare indexes/things indexes/others new", "compare indexes/things indexes/others new --json"],
    "serve": ["serve indexes/things", "serve indexes/things indexes/others --port 0 --token secret"],
    "fit": ["fit indexes/things", "fit indexes/things --calibrate --val validation"],
    "search-hp": ["search-hp indexes/things", "search-hp indexes/things --val validation --dry-run"],
    "finetune": [
        "finetune indexes/things --out indexes/things-f",
        "finetune indexes/things --val validation --train keys --train values --out indexes/things-f",
    ],
    "models": ["models siglip", "models --try photos --model clip+dinov2"],
    "doctor": ["doctor", "doctor --json"],
    "cache": ["cache --max-size 2", "cache --prune"],
}
