# %% [markdown]
# # 5. Batch norm by hand
#
# Batch norm (Ioffe and Szegedy, 2015, <https://arxiv.org/abs/1502.03167>) normalizes each channel of a layer's output
# over the batch, and then gives it a scale and an offset that the network learns. You write it in NumPy, forward and
# backward, check it by numerical gradients and against the op `tfops.fused_batch_norm`, see what inference does
# differently, and how float32 can lose the variance. It runs in seconds.
#
# This file is a script, `python models/batch_norm_by_hand.py`, and a notebook, `models/batch_norm_by_hand.ipynb`, of
# the same text.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf

import tfops

FOLDER = Path("runs/lessons/batch_norm_by_hand")  # the picture goes there
EPSILON = 1e-3  # keeps the division finite where a channel has no variance
MOMENTUM = 0.9  # of the moving averages: how much of the old value they keep
BATCHES = 200  # from which the moving averages learn
CHANNELS, ELEMENTS = 8, 65_536  # of the data in the last section; elements in a channel

FOLDER.mkdir(parents=True, exist_ok=True)
plt.rc("figure", dpi=80, figsize=(8, 3))
random = np.random.default_rng(1)
x = random.normal(loc=2.0, scale=3.0, size=(4, 3, 3, 2))
gamma, beta = random.normal(size=2), random.normal(size=2)  # the learned scale and offset of each channel

# %% [markdown]
# ## Forward
#
# A channel has n elements: those of all images and all positions. With sums over these,
#
# $$\mu = \frac1n \sum_i x_i, \qquad \sigma^2 = \frac1n \sum_i (x_i - \mu)^2, \qquad
# \hat x_i = \frac{x_i - \mu}{\sqrt{\sigma^2 + \epsilon}}, \qquad y_i = \gamma\, \hat x_i + \beta.$$


# %%
def forward(x, gamma, beta):
    mean = x.mean(axis=(0, 1, 2))
    variance = ((x - mean) ** 2).mean(axis=(0, 1, 2))
    xhat = (x - mean) / np.sqrt(variance + EPSILON)
    return gamma * xhat + beta, mean, variance


y, mean, variance = forward(x, gamma, beta)
print("x: mean", x.mean(axis=(0, 1, 2)).round(3), "standard deviation", x.std(axis=(0, 1, 2)).round(3))
print("y: mean", y.mean(axis=(0, 1, 2)).round(3), "standard deviation", y.std(axis=(0, 1, 2)).round(3))
print("beta   ", beta.round(3), "|gamma|           ", np.abs(gamma).round(3))

# %% [markdown]
# ## Backward
#
# Let $g_i = \partial L / \partial y_i$, which the layer above hands down. From $y_i = \gamma \hat x_i + \beta$,
#
# $$\frac{\partial L}{\partial \beta} = \sum_i g_i, \qquad
# \frac{\partial L}{\partial \gamma} = \sum_i g_i \hat x_i, \qquad
# \frac{\partial L}{\partial \hat x_i} = \gamma g_i.$$
#
# An input acts on the loss in three ways: through its own $\hat x_i$, and through $\sigma^2$ and $\mu$, which all
# elements share. Write $r = 1 / \sqrt{\sigma^2 + \epsilon}$, so that $\hat x_i = (x_i - \mu)\, r$. Then
#
# $$\frac{\partial L}{\partial \sigma^2} = \sum_j \gamma g_j (x_j - \mu) \cdot \left(-\tfrac12 r^3\right), \qquad
# \frac{\partial L}{\partial \mu} = -r \sum_j \gamma g_j$$
#
# ($\sigma^2$ depends on $\mu$ too, but its derivative, $-\frac2n \sum_j (x_j - \mu)$, is 0), and with
# $\partial \sigma^2 / \partial x_i = \frac2n (x_i - \mu)$ and $\partial \mu / \partial x_i = \frac1n$,
#
# $$\frac{\partial L}{\partial x_i} = \gamma g_i\, r + \frac{\partial L}{\partial \sigma^2} \frac2n (x_i - \mu)
# + \frac{\partial L}{\partial \mu} \frac1n.$$
#
# Insert the two derivatives, and their sums are those of beta and gamma:
#
# $$\frac{\partial L}{\partial x_i} = \gamma r \left(g_i - \frac1n \frac{\partial L}{\partial \beta}
# - \frac{\hat x_i}{n} \frac{\partial L}{\partial \gamma}\right).$$
#
# The gradient has had its mean removed, and its component along $\hat x$: neither a shift of the channel nor a change
# of its spread reaches the loss.


# %%
def backward(g, x, gamma, mean, variance):
    n = x.size / x.shape[-1]
    r = 1 / np.sqrt(variance + EPSILON)
    xhat = (x - mean) * r
    dbeta = g.sum(axis=(0, 1, 2))
    dgamma = (g * xhat).sum(axis=(0, 1, 2))
    dx = gamma * r * (g - dbeta / n - xhat * dgamma / n)
    return dx, dgamma, dbeta


g = random.normal(size=x.shape)  # any gradient: that of the loss L = sum(g * y)
dx, dgamma, dbeta = backward(g, x, gamma, mean, variance)

# %% [markdown]
# ## Check 1: numerical gradients
#
# Move one number by h, up and down, and see by how much the loss changes: $(L(v + h) - L(v - h)) / 2h$. This needs no
# derivation, so it finds what is wrong in one. Its own error is about $h^2$ from the curvature and $10^{-16} / h$ from
# rounding.


# %%
def numerical_gradient(loss, value, h=1e-5):
    gradient = np.zeros_like(value)
    for i in np.ndindex(value.shape):
        kept = value[i]
        value[i] = kept + h
        above = loss()
        value[i] = kept - h
        gradient[i] = (above - loss()) / (2 * h)
        value[i] = kept
    return gradient


def relative_error(got, want):
    return np.abs(got - want).max() / np.abs(want).max()


for name, value, derived in (("x", x, dx), ("gamma", gamma, dgamma), ("beta", beta, dbeta)):
    numerical = numerical_gradient(lambda: (g * forward(x, gamma, beta)[0]).sum(), value)
    print(f"gradient of {name}: relative error {relative_error(derived, numerical):.1e}")

# %% [markdown]
# `python -m tfops.gradcheck` does this for the op: every data type, layout, mode and activation.
#
# ## Check 2: the op
#
# TensorFlow differentiates `tfops.fused_batch_norm` by a kernel for the formula above. (`unbiased=False`: by default
# the op returns the variance with n - 1 in place of n, as TensorFlow's own does, for the moving average below.)


# %%
def compare(names, by_op, by_hand):
    for name, got, want in zip(names, by_op, by_hand, strict=True):
        print(f"{name}: relative error {relative_error(got.numpy(), want):.1e}")


inputs = [tf.Variable(value) for value in (x, gamma, beta)]
with tf.GradientTape() as tape:
    results = tfops.fused_batch_norm(*inputs, epsilon=EPSILON, unbiased=False)
    loss = tf.reduce_sum(g * results[0])
by_op = [*results, *tape.gradient(loss, inputs)]
compare(("y", "mean", "variance", "dx", "dgamma", "dbeta"), by_op, (y, mean, variance, dx, dgamma, dbeta))

# %% [markdown]
# In a residual network an addition and ReLU follow: $o = \max(y + s, 0)$. Where $o$ is 0, ReLU passes no gradient. The
# addition passes on what it gets, to both operands. So the gradient is masked, and then goes to `backward`. The op does
# all three steps at once, forward and backward.

# %%
shortcut = random.normal(size=x.shape)
output = np.maximum(y + shortcut, 0)
dshortcut = g * (output > 0)

inputs.append(tf.Variable(shortcut))
with tf.GradientTape() as tape:
    fused, *_ = tfops.fused_batch_norm(*inputs[:3], epsilon=EPSILON, activation="relu", residual=inputs[3])
    loss = tf.reduce_sum(g * fused)
by_op = [fused, *tape.gradient(loss, inputs)]
by_hand = [output, *backward(dshortcut, x, gamma, mean, variance), dshortcut]
compare(("output", "dx", "dgamma", "dbeta", "dshortcut"), by_op, by_hand)

# %% [markdown]
# ## Inference: moving averages
#
# In training an image's output depends on what else is in the batch. A network in use must not do that, and may get one
# image alone. So training also keeps moving averages of the batches' means and variances,
# $m \leftarrow 0.9\, m + 0.1\, \mu$, and inference takes them in place of $\mu$ and $\sigma^2$. They are constants:
# batch norm is then a scale and an offset per channel, and its gradient is $\gamma r g_i$ alone.

# %%
moving_mean, moving_variance = np.zeros(2), np.ones(2)
for _ in range(BATCHES):
    batch = random.normal(loc=2.0, scale=3.0, size=x.shape)
    _, batch_mean, batch_variance = forward(batch, gamma, beta)
    moving_mean = MOMENTUM * moving_mean + (1 - MOMENTUM) * batch_mean
    moving_variance = MOMENTUM * moving_variance + (1 - MOMENTUM) * batch_variance
print("moving mean", moving_mean.round(2), "(2 is right), variance", moving_variance.round(2), "(9 is right)")

one = x[:1]
alone, _, _ = forward(one, gamma, beta)
print("training: y of an image alone and in its batch differ by up to", np.abs(alone - y[:1]).max().round(2))
inference = gamma * (one - moving_mean) / np.sqrt(moving_variance + EPSILON) + beta
op, *_ = tfops.fused_batch_norm(one, gamma, beta, moving_mean, moving_variance, epsilon=EPSILON, is_training=False)
compare(["inference"], [op], [inference])

# %% [markdown]
# ## Why the variance needs care
#
# $\sigma^2 = E[x^2] - E[x]^2$ needs one pass over the data, and so it is what many write. Where the mean is large
# beside the standard deviation, it subtracts two large numbers that agree in most of their digits. float32 has seven:
# at a ratio |mean| / std of 1,000 the mean's square is a million times the variance, and one digit is left, at best.
# Beyond, the result may even be negative, and its square root NaN. Two passes, the mean first and then the squares of
# $x - \mu$, lose little. tfops needs no second pass over memory for that: it sums squares about a number near the mean,
# and joins the parts by Chan's rule (`csrc/README.md`).

# %%
ratios, errors = np.logspace(0, 4, 9), {"E[x²] - E[x]²": [], "two passes": [], "tfops": []}
ones, zeros = np.ones(CHANNELS, np.float32), np.zeros(CHANNELS, np.float32)
for ratio in ratios:
    x32 = random.normal(ratio, 1.0, (CHANNELS, ELEMENTS)).astype(np.float32)
    exact = x32.astype(np.float64).var(axis=1)
    one_pass = (x32**2).mean(axis=1) - x32.mean(axis=1) ** 2
    two_passes = ((x32 - x32.mean(axis=1, keepdims=True)) ** 2).mean(axis=1)
    _, _, by_tfops = tfops.fused_batch_norm(x32, ones, zeros, axis=0, unbiased=False)
    for method, found in zip(errors, (one_pass, two_passes, by_tfops.numpy()), strict=True):
        errors[method].append(relative_error(found, exact))

figure, axes = plt.subplots(layout="constrained")
for method, found in errors.items():
    axes.loglog(ratios, np.maximum(found, 1e-9), "o-", label=method)
axes.set(xlabel="|mean| / standard deviation", ylabel="relative error of the variance", title="float32")
axes.legend()
figure.savefig(FOLDER / "variance.png")
print("at 10,000:", {method: f"{found[-1]:.0e}" for method, found in errors.items()})
print("Pictures:", *sorted(path.name for path in FOLDER.glob("*.png")), "in", FOLDER)

# %% [markdown]
# ## Exercises
#
# 1. Break the derivation: leave the last term out of `dx`. Which check finds it, and how large is the error?
# 2. Add 1,000 to every element of `x`. How do `y` and the gradients change? And if `x` is multiplied by 10?
# 3. Write the forward and backward pass of layer norm, which normalizes each image over its height, width and channels,
#    and has gamma and beta per channel. Check it by numerical gradients.
#
# Answers: [answers/batch_norm_by_hand.md](answers/batch_norm_by_hand.md)
