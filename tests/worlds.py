"""What several test files use."""

import numpy as np

import data


def world_pairs(seed: int, demonstrations: int, pairs: int) -> list[data.Row]:
    """Preference rows of the embedded world: two demonstrations of a prompt, the truly better chosen; ties are drawn again.

    They are drawn after the demonstrations of `data.tiny_world(seed, demonstrations)`, from the same generator.
    """
    rng, prompts = np.random.default_rng(seed), data.world_prompts(seed)[data.HELD_OUT_PROMPTS :]
    for prompt in rng.choice(prompts, demonstrations):
        data.world_demonstration(prompt, rng)
    rows = []
    while len(rows) < pairs:
        prompt = str(rng.choice(prompts))
        a, b = data.world_demonstration(prompt, rng), data.world_demonstration(prompt, rng)
        better, worse = data.world_quality(prompt, a), data.world_quality(prompt, b)
        if better != worse:
            responses = [a, b] if better > worse else [b, a]
            rows.append(data.Row([{"role": "user", "content": prompt}], responses))
    return rows
