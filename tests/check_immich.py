"""Check requests and answers with the strict models of immichpy. Prints the number of exchanges."""

import json
import re
import sys
from pathlib import Path

from immichpy.client.generated import models

MODELS = {
    "GET /api/server/version": (None, "ServerVersionResponseDto"),
    "GET /api/api-keys/me": (None, "ApiKeyResponseDto"),
    "GET /api/users/me": (None, "UserAdminResponseDto"),
    "GET /api/tags": (None, "TagResponseDto"),
    "PUT /api/tags": ("TagUpsertDto", "TagResponseDto"),
    "PUT /api/tags/ID/assets": ("BulkIdsDto", "BulkIdResponseDto"),
    "DELETE /api/tags/ID/assets": ("BulkIdsDto", "BulkIdResponseDto"),
    "DELETE /api/tags/ID": (None, None),
    "GET /api/albums": (None, "AlbumResponseDto"),
    "POST /api/search/metadata": ("MetadataSearchDto", "SearchResponseDto"),
    "GET /api/assets/ID": (None, "AssetResponseDto"),
}


def plain(value):
    """Return a value as JSON has it, without nulls."""
    return json.loads(json.dumps(value, default=str))


def check(name, value):
    """Check a value, and that the model knows every field."""
    read = getattr(models, name).from_dict(value)
    written = plain(read.to_dict())
    for field in value:
        assert field in written or value[field] is None, (name, field)


exchanges = json.loads(Path(sys.argv[1]).read_text())
for method, path, body, answer in exchanges:
    asked, answered = MODELS[re.sub("[0-9a-f-]{36}", "ID", f"{method} {path}")]
    assert (asked is None) == (not body), path
    if asked is not None:
        check(asked, body)
    if answered is None:
        assert answer is None
    for item in answer if isinstance(answer, list) else filter(None, [answer]):
        check(answered, item)
print(len(exchanges))
