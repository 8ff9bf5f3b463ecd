"""What is measured on labelled responses: each a share, summed over images, with a bootstrap over images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64

from crosslayer.hallucination.responses import Response
from crosslayer.metrics import Figure, ratio


@dataclass(frozen=True)
class Measure:
    """A share: the sum of `above` over all responses, divided by the sum of `below`.

    A response with 0 below the line has no part in it. Two sets of responses to the same queries, an original's and an
    edited model's, can be compared pair by pair through `counts`.
    """

    name: str
    above: Callable[[Response], float]
    below: Callable[[Response], float]

    def counts(self, responses: Sequence[Response]) -> Float64[np.ndarray, "2 n"]:
        """What each response adds above and below the line."""
        return np.array([[self.above(r) for r in responses], [self.below(r) for r in responses]], np.float64)


def image_sums(responses: Sequence[Response], counts: Float64[np.ndarray, "2 n"]) -> Float64[np.ndarray, "2 images"]:
    """Counts summed over the responses to each image, in the order in which the images appear."""
    places = {image: place for place, image in enumerate(dict.fromkeys(r.image_id for r in responses))}
    of = [places[r.image_id] for r in responses]
    return np.stack([np.bincount(of, weights=row, minlength=len(places)) for row in counts])


def figure(measure: Measure, responses: Sequence[Response], *, resamples: int = 2000) -> Figure:
    """The measure with its 95 % interval, from a bootstrap in which all responses to an image are drawn together."""
    above, below = torch.from_numpy(image_sums(responses, measure.counts(responses)))
    return ratio(above, below, resamples=resamples)
