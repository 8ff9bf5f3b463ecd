"""What tells one trained transcoder from another, in a few letters."""

import hashlib
from dataclasses import asdict

from crosslayer.coders.transcoder import CrossLayerTranscoder


def fingerprint(coder: CrossLayerTranscoder) -> str:
    """16 hexadecimal digits of the wiring, the encoders' biases and thresholds, and the mean writes.

    They differ between any two trainings, whatever the folder is called, and are quick to read even of a transcoder
    of many gigabytes.
    """
    digest = hashlib.sha256(repr((asdict(coder.wiring), coder.d_model, coder.d_transcoder)).encode())
    thresholds = [] if coder.thresholds is None else [coder.thresholds]
    for tensor in (*coder.b_enc, coder.b_dec, coder.first_write, *thresholds):
        digest.update(tensor.detach().float().contiguous().numpy(force=True).tobytes())
    return digest.hexdigest()[:16]
