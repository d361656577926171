"""Pictures and sounds that a framework hands over in memory, as files that are read like any other."""

from __future__ import annotations

import hashlib
import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL.Image import Image

from acckv.io.files import whole_file


class MediaStore:
    """Files in a folder, named by their content, so that the same picture or sound is the same file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def picture(self, image: Image) -> Path:
        """A PNG file of an image."""
        data = io.BytesIO()
        image.convert("RGB").save(data, "png", compress_level=1)
        return self.file(data.getvalue(), ".png")

    def sound(self, samples: Any, rate: int) -> Path:
        """A WAV file of samples ``[count]`` or ``[channels, count]`` in -1..1; channels are averaged."""
        mono = np.atleast_2d(np.asarray(samples, dtype=np.float32)).mean(axis=0)
        data = io.BytesIO()
        with av.open(data, "w", format="wav") as container:
            stream = container.add_stream("pcm_f32le", rate=rate, layout="mono")
            frame = av.AudioFrame.from_ndarray(mono[None], format="flt", layout="mono")
            frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), 0
            container.mux([*stream.encode(frame), *stream.encode(None)])
        return self.file(data.getvalue(), ".wav")

    def file(self, data: bytes, ending: str) -> Path:
        """A file that holds these bytes."""
        path = self.folder / (hashlib.sha256(data).hexdigest()[:32] + ending)
        if not path.is_file():
            with whole_file(path) as partial:
                partial.write_bytes(data)
        return path
