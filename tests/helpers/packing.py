"""The bytes of files that functions write."""

import io


def packed(save, *arrays, **named):
    stream = io.BytesIO()
    save(stream, *arrays, **named)
    return stream.getvalue()
