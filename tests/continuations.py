"""What `longreach.models.generate.stream` gives, put together."""

from longreach.models.generate import stream


def generate(model, prompts, **options):
    """The new token ids of each prompt, up to and without eos."""
    steps = list(stream(model, prompts, **options))
    return [[step[row] for step in steps if step[row] is not None] for row in range(len(prompts))]
