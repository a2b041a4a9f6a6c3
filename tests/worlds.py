"""What several test files use."""

import numpy as np
import toy

from data import Row, answer


def world_pairs(seed: int, demonstrations: int, pairs: int) -> list[Row]:
    """Preference rows of the toy task: two demonstrations of a prompt, the truly better chosen; ties are drawn again.

    They are drawn after the demonstrations of `toy.demonstrations(seed, demonstrations)`, from the same generator.
    """
    rng = np.random.default_rng(seed)
    prompts = toy.all_prompts(seed)[toy.HELD_OUT_PROMPTS :]
    for prompt in rng.choice(prompts, demonstrations):
        toy.demonstration(prompt, rng)
    rows = []
    while len(rows) < pairs:
        prompt = str(rng.choice(prompts))
        a = toy.demonstration(prompt, rng)
        b = toy.demonstration(prompt, rng)
        better = toy.quality(prompt, a)
        worse = toy.quality(prompt, b)
        if better != worse:
            responses = [a, b] if better > worse else [b, a]
            rows.append(Row([{"role": "user", "content": prompt}], list(map(answer, responses))))
    return rows
