"""The formulas again, as plain loops in double precision. Slow and obvious; nothing here imports jrlhf or JAX."""

import math

import numpy as np


def log_softmax(row):
    row = [float(x) for x in row]
    top = max(row)
    log_z = top + math.log(sum(math.exp(x - top) for x in row))
    return [x - log_z for x in row]


def token_logprobs(logits, tokens, temperature):
    """The log-prob of each token and the entropy of the distribution it came from; 0 at index 0."""
    rows, length, _ = logits.shape
    logprobs, entropy = np.zeros((rows, length)), np.zeros((rows, length))
    for b in range(rows):
        for t in range(1, length):
            logp = log_softmax([float(x) / temperature for x in logits[b, t - 1]])
            logprobs[b, t] = logp[tokens[b, t]]
            entropy[b, t] = -sum(math.exp(x) * x for x in logp if x > -math.inf)
    return logprobs, entropy


def masked_mean(x, mask):
    kept = [float(v) for v, m in zip(np.ravel(x), np.ravel(mask), strict=True) if m]
    return sum(kept) / len(kept) if kept else 0.0


def masked_whiten(x, mask, shift_mean):
    mean = masked_mean(x, mask)
    variance = masked_mean((np.asarray(x, np.float64) - mean) ** 2, mask)
    out = np.zeros(np.shape(x))
    for i in np.ndindex(*np.shape(x)):
        if mask[i]:
            out[i] = (float(x[i]) - mean) / math.sqrt(variance + 1e-8) + (0.0 if shift_mean else mean)
    return out


def kl(logprob, ref_logprob, estimator):
    x = float(logprob) - float(ref_logprob)
    return {"k1": x, "k2": x * x / 2, "k3": math.exp(-x) - 1 + x}[estimator]


def kl_coef(coef, observed, n, target, horizon):
    error = max(-0.2, min(0.2, observed / target - 1))
    return coef * (1 + error * n / horizon)


def shape_rewards(scores, kl, mask, kl_coef):
    out = np.zeros(kl.shape)
    for b in range(len(scores)):
        real = [t for t in range(kl.shape[1]) if mask[b, t]]
        for t in real:
            out[b, t] = -kl_coef * float(kl[b, t])
        if real:
            out[b, real[-1]] += float(scores[b])
    return out


def gae(rewards, values, mask, gamma, lam):
    """Advantages as the definition has them: Σ over later real tokens of (γλ)^l · δ, not by the recurrence."""
    real = [t for t in range(len(rewards)) if mask[t]]
    value = [float(values[t]) for t in real] + [0.0]
    delta = [float(rewards[t]) + gamma * value[i + 1] - value[i] for i, t in enumerate(real)]
    advantages, returns = np.zeros(len(rewards)), np.zeros(len(rewards))
    for i, t in enumerate(real):
        advantages[t] = sum((gamma * lam) ** (j - i) * delta[j] for j in range(i, len(real)))
        returns[t] = advantages[t] + value[i]
    return advantages, returns


def minus_log_sigmoid(x):
    return math.log1p(math.exp(-abs(x))) + max(-x, 0.0)


def pairs(ranks, mask):
    return [
        (i, j)
        for i in range(len(ranks))
        for j in range(len(ranks))
        if mask[i] and mask[j] and int(ranks[i]) < int(ranks[j])
    ]


def kwise_ranking(scores, ranks, mask, margin):
    losses = [minus_log_sigmoid(float(scores[i]) - float(scores[j]) - margin) for i, j in pairs(ranks, mask)]
    return sum(losses) / len(losses) if losses else 0.0


def kwise_centering(scores, ranks, mask):
    squares = [(float(scores[i]) + float(scores[j])) ** 2 for i, j in pairs(ranks, mask)]
    return sum(squares) / len(squares) if squares else 0.0


def dpo(policy_margin, reference_margin, margin, beta, kind, label_smoothing):
    """One ordered pair, each loss as its paper writes it."""
    if kind == "simpo":
        return minus_log_sigmoid(beta * policy_margin - margin)
    h = policy_margin - reference_margin
    if kind == "ipo":
        return (h - margin / beta - 1 / (2 * beta)) ** 2
    z = beta * h - margin
    return (1 - label_smoothing) * minus_log_sigmoid(z) + label_smoothing * minus_log_sigmoid(-z)


def kwise_dpo(logprobs, ref_logprobs, ranks, mask, margin, **options):
    losses = [
        dpo(
            float(logprobs[i]) - float(logprobs[j]),
            float(ref_logprobs[i]) - float(ref_logprobs[j]),
            float(margin),
            **options,
        )
        for i, j in pairs(ranks, mask)
    ]
    return sum(losses) / len(losses) if losses else 0.0


def policy_loss(logprob, old_logprob, advantage, clip, dual_clip):
    ratio = math.exp(max(-20.0, min(20.0, float(logprob) - float(old_logprob))))
    clipped = max(1 - clip, min(1 + clip, ratio))
    loss = max(-advantage * ratio, -advantage * clipped)
    if dual_clip is not None and advantage < 0:
        loss = min(loss, -advantage * dual_clip)
    return loss


def value_loss(value, old_value, target, clip):
    clipped = max(old_value - clip, min(old_value + clip, value))
    return 0.5 * max((value - target) ** 2, (clipped - target) ** 2)


def truncated_distribution(logits, temperature, top_k, top_p):
    """The renormalised probabilities; ties go to the lower id."""
    probs = np.exp(log_softmax([float(x) / temperature for x in logits]))
    order = sorted(range(len(probs)), key=lambda i: (-float(logits[i]), i))
    if top_k:
        order = order[:top_k]
    total = sum(probs[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        if kept and mass >= top_p:
            break
        kept.append(i)
        mass += probs[i] / total
    out = np.zeros(len(probs))
    for i in kept:
        out[i] = probs[i] / sum(probs[j] for j in kept)
    return out


def each(function, *arrays):
    """``function`` of every element."""
    return np.array([function(*(float(x) for x in xs)) for xs in zip(*map(np.ravel, arrays), strict=True)]).reshape(
        np.shape(arrays[0])
    )


def kto(log_ratios, desirable, mismatched, beta, desirable_weight, undesirable_weight):
    """Each answer, as the paper writes it: λ - λ·σ(β·(r - z₀)), or λ - λ·σ(β·(z₀ - r))."""
    point = max(sum(float(x) for x in mismatched) / max(len(mismatched), 1), 0.0)
    losses = []
    for ratio, good in zip(log_ratios, desirable, strict=True):
        weight = desirable_weight if good else undesirable_weight
        gain = beta * (float(ratio) - point) * (1 if good else -1)
        losses.append(weight - weight * math.exp(-minus_log_sigmoid(gain)))
    return losses
