"""CLIP-Diffusion-LM written a second time, plainly, to check ours against: from the paper and the audit of its code.

Nothing here imports the project. Where the paper and its published code differ, both are here, named ``paper`` and
``code``; what neither says is marked "Assumption". "Item n" is a row of the audit's tables 1a (1-4) and 1b (5-23).
All randomness (noise, timesteps, dropped texts) is an argument, so two implementations can be given the same.

Shape letters, used in every module:
    K timesteps drawn per caption    B captions in the batch    N = any number of rows, K * B flattened K-major
    L caption positions (16)         S = L + feature tokens     D word embedding width     F CLIP feature width
    V words of the vocabulary        T diffusion steps (1000)   E training epochs

    schedule       alpha_bar and the timesteps drawn
    noising        x_t from x_0, and what the model is asked to predict
    forward        one diffusion stage: fusion, DistilBERT, guidance
    losses         the three terms, their reductions, and the whole training loss
    rules          rounding weight, learning rate and early stop over a run
    inference      from noise to words, repeated words removed
    seed_metric    the code's private BLEU and its split by caption row
"""
