"""Speculative decoding without a second model. Pure Python; no torch.

A step of decoding reads all weights for one token of each sequence. Where text repeats itself (a quotation, code that
is edited, an answer that copies its question), the next tokens can be guessed from the sequence's own earlier tokens,
and one step checks several guesses at nearly the cost of one token:

    NgramProposer     guesses: what followed the last tokens where they stood before        one for each sequence
    AcceptanceRate    how likely a guess is right, measured                                 one for each sequence
    StepTime          what a further row of a step costs, measured
    draft_lengths     how many guesses of which sequence pay
    Speculator        the four together, for the scheduler

The token of position p is drawn from the logits of position p - 1 and the random number of (seed, p) alone. So every
row of a draft is sampled as ever, and a guess is accepted when it is the very token that was sampled; the first sampled
token that differs is the right one anyway. The tokens are those of decoding one by one, greedy or sampled.

Source: Leviathan, Kalman and Matias, "Fast inference from transformers via speculative decoding", ICML 2023, with a
deterministic draft; guesses from the prompt: Saxena, "Prompt lookup decoding", 2023.
"""
