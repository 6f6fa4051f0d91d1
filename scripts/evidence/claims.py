"""The claims of the paper, and what judges each."""

from scripts.evidence.claim import Claim
from scripts.evidence.gradient_claims import errors_fall, errors_grow, increments_shrink, on_moments
from scripts.evidence.judge import diverges
from scripts.evidence.measured_claims import (
    cost_beside_fixed_point,
    memory,
    on_shapes,
    parameter_counts,
    shared_backward,
    speed_of_recurrence,
    theorem,
)
from scripts.evidence.paper import paper_rows
from scripts.evidence.score_claims import (
    RNNS,
    better_everywhere,
    five_iterations,
    fixed_point_fails,
    is_worse,
    matches_at,
    on_runs,
    perplexity_of_k_0,
    reaches,
)

CLAIMS: dict[str, Claim] = {
    "k iterations give the sum over all paths through at most k blocks; k = L is exact": Claim(
        "Theorems 1 and 2", theorem, command="make test"
    ),
    "ResNet-32 ends below backpropagation at k = 0, the residual path alone": on_runs(
        "Figure 2", is_worse(("highway", 0), ("bp",)), "resnet32"
    ),
    "with the modified downsampling backpropagation reaches 92.75 % with ResNet-32": on_runs(
        "review discussion", reaches(("bp", None)), "resnet32"
    ),
    "ResNet-32 reaches 82.38, 89.0 and 91.0 % at k = 0, 1 and 2": on_runs(
        "review discussion", reaches(("highway", 0), ("highway", 1), ("highway", 2)), "resnet32"
    ),
    "ResNet-32 matches backpropagation at k = 3": on_runs(
        "Figure 2, review discussion", matches_at(3), "resnet32"
    ),
    "ResNet-110 matches backpropagation at k = 4, with L = 54": on_runs(
        "section 4, Figure 2", matches_at(4), "resnet110"
    ),
    "ResNet-56 on ImageNet32 matches backpropagation at k = 5": on_runs(
        "Figure 2", matches_at(5), "resnet56"
    ),
    "GPT-2 diverges with the plain split, gamma = 0, and not with gamma = 0.2": on_runs(
        "appendix C.3", lambda setting: diverges(setting, 0.0, 0.2), "gpt2"
    ),
    "with gamma = 0.2, GPT-2 matches backpropagation with few iterations": on_runs(
        "Figures 2 and 3", matches_at(gamma=0.2), "gpt2"
    ),
    "with gamma = 0.8, RoBERTa can be fine-tuned with few iterations": on_runs(
        "Figure 2", matches_at(gamma=0.8), "roberta"
    ),
    "about five iterations suffice in most cases": Claim(
        "section 4, conclusion", five_iterations, tuple(paper_rows())
    ),
    "Highway-BP is better than fixed-point iteration at equal k": Claim(
        "Figure 4", better_everywhere, RNNS
    ),
    # at k = 0 the fixed point's gradient consists of the losses' own gradients alone
    "at k = 0 fixed-point iteration is worse than Highway-BP": on_runs(
        "Figure 4; with the LSTM's carry of Table 1 (carry=literal) the two are one",
        is_worse(("fixed_point", 0), ("highway", 0)),
        *RNNS,
    ),
    "the GRU on pixels matches backpropagation at k = 10": on_runs(
        "Figure 4", matches_at(10), "gru_pixels"
    ),
    "fixed-point iteration fails on pixels, where the only loss is at the end": on_runs(
        "Figure 4", fixed_point_fails, "gru_pixels"
    ),
    "the 3-layer GRU reaches a perplexity of about 50 with k = 0": on_runs(
        "section 4", perplexity_of_k_0, "gru_words"
    ),
    "recurrent networks train up to 3.5 times faster than by a loop over cells": on_shapes(
        "Table 3", "times faster than a loop over cells", speed_of_recurrence
    ),
    "an iteration of Highway-BP costs little more than one of the fixed point": on_shapes(
        "Table 6", "Highway-BP's step over the fixed point's, k = 1 to 20", cost_beside_fixed_point
    ),
    "memory: at most two more hidden states per layer than backpropagation": Claim(
        "appendix D", memory, command="make bench"
    ),
    "the gradient comes closer to the exact one with every k": on_moments(
        "the cosine with the exact gradient rises with every k:", errors_fall
    ),
    "the error of the gradient grows during training": on_moments(
        "the error at a k is larger at the end than after a tenth:", errors_grow
    ),
    "each iteration adds less than the one before": on_moments(
        "increments shrink from k = 1 on:", increments_shrink
    ),
    "with a device per layer, the backward pass takes k / L of its time": Claim(
        "Eq. 13, appendix E", shared_backward, command="make bench"
    ),
    "the networks have the printed numbers of parameters": Claim(
        "Table 2", parameter_counts, command="pytest tests/experiments/test_presets.py"
    ),
}
