"""Encode and classify images on a Ray cluster. The package ``ray`` is only imported when it is needed."""
