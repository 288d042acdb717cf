# %% [markdown]
# # 7. What batch norm buys
#
# You train a deep plain network on MNIST's digits with many learning rates, with batch norm and without, and draw where
# each of them learns. It takes two to three minutes.
#
# This file is a script, `python models/what_batch_norm_buys.py`, and a notebook, `models/what_batch_norm_buys.ipynb`,
# of the same text.

# %%
import os
from pathlib import Path

import keras
import matplotlib.pyplot as plt
import numpy as np

import tfops.keras
from trainer.data import load_mnist

QUICK = "LESSON_QUICK" in os.environ  # set by the tests: a few steps only
FOLDER = Path("runs/lessons/what_batch_norm_buys")  # the picture goes there
LEARNING_RATES = [0.01, 1.0] if QUICK else [0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0]
SEEDS = [1] if QUICK else [1, 2, 3]  # each training is repeated with other initial weights and another order of images
DEPTH = 10  # hidden layers
WIDTH = 100  # units of each
BATCH_SIZE = 100
TRAINING_IMAGES = 20_000  # of 60,000; one pass over these

FOLDER.mkdir(parents=True, exist_ok=True)
plt.rc("figure", dpi=80, figsize=(8, 3))

# %% [markdown]
# ## Data

# %%
digits = load_mnist()
x_train = digits.x_train[:TRAINING_IMAGES].reshape(-1, 784).astype("float32") / 255
x_test = digits.x_test.reshape(-1, 784).astype("float32") / 255
y_train, y_test = digits.y_train[:TRAINING_IMAGES], digits.y_test
print(f"{len(x_train):,} images to train on, {len(x_test):,} to test on")

# %% [markdown]
# ## Two networks that differ in batch norm alone
#
# Ten hidden layers of 100 units: deep for digits, and plain, without shortcuts. Both start from He's initial weights,
# which keep the size of activations about the same from layer to layer *before* the first step. Batch norm keeps it so
# after every step. Its offset takes the place of the dense layer's bias, and tfops computes ReLU in the same op.


# %%
def make_model(batch_norm):
    layers = [keras.Input((784,))]
    for _ in range(DEPTH):
        if batch_norm:
            layers.append(keras.layers.Dense(WIDTH, use_bias=False, kernel_initializer="he_normal"))
            layers.append(tfops.keras.BatchNormalization(momentum=0.9, activation="relu"))
        else:
            layers.append(keras.layers.Dense(WIDTH, activation="relu", kernel_initializer="he_normal"))
    return keras.Sequential([*layers, keras.layers.Dense(10)])


for batch_norm in (False, True):
    print(f"batch norm {batch_norm}: {make_model(batch_norm).count_params():,} parameters")

# %% [markdown]
# ## One training
#
# One pass over the images with plain gradient descent: no momentum, no Adam, no schedule, all of which would change the
# picture. Returned are loss and accuracy on the test images. Where weights overflow, the loss is NaN.


# %%
def train(model, batch_norm, learning_rate, seed):
    keras.utils.set_random_seed(seed)
    model.set_weights(make_model(batch_norm).get_weights())  # begin anew; a new model would have to be traced again
    model.optimizer.learning_rate = learning_rate
    model.fit(x_train, y_train, BATCH_SIZE, verbose=0)
    return model.evaluate(x_test, y_test, batch_size=1000, verbose=0)


# %% [markdown]
# ## The sweep

# %%
losses, accuracies = {}, {}
for batch_norm in (False, True):
    model = make_model(batch_norm)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(), loss, metrics=["accuracy"])
    for learning_rate in LEARNING_RATES:
        results = [train(model, batch_norm, learning_rate, seed) for seed in SEEDS]
        losses[batch_norm, learning_rate] = [loss for loss, _ in results]
        accuracies[batch_norm, learning_rate] = [accuracy for _, accuracy in results]
        name = f"{'with   ' if batch_norm else 'without'} batch norm, learning rate {learning_rate:5}"
        print(f"{name}: accuracy", *(f"{accuracy:.1%}" for _, accuracy in results))

# %% [markdown]
# A line is drawn through the medians, and a dot is one training. Losses that are NaN, or above guessing's
# $\log 10 = 2.3$, are drawn at its height.

# %%
figure, (loss_axes, accuracy_axes) = plt.subplots(1, 2, layout="constrained")
guessing = np.log(10)
for batch_norm, color in ((False, "tab:orange"), (True, "tab:blue")):
    label = "with batch norm" if batch_norm else "without"
    for axes, results in ((loss_axes, losses), (accuracy_axes, accuracies)):
        values = np.array([results[batch_norm, learning_rate] for learning_rate in LEARNING_RATES])
        if axes is loss_axes:
            values = np.nan_to_num(values, nan=guessing).clip(max=guessing)
        axes.semilogx(LEARNING_RATES, values, ".", color=color)
        axes.semilogx(LEARNING_RATES, np.median(values, axis=1), color=color, label=label)
loss_axes.set(xlabel="learning rate", ylabel="test loss")
accuracy_axes.set(xlabel="learning rate", ylabel="test accuracy", ylim=(0, 1))
accuracy_axes.legend(loc="lower center")
figure.savefig(FOLDER / "sweep.png")
print("Pictures:", *sorted(path.name for path in FOLDER.glob("*.png")), "in", FOLDER)

# %% [markdown]
# With 20,000 of MNIST's images: without batch norm the network learns well at 0.03 and 0.1 alone; at 0.3 it depends on
# the seed, and from 1 on it only guesses. With batch norm all rates from 0.03 to 3 give 85 % or more, and the best
# median is 93.7 %, not 89.4 %. At 0.003 and 0.01 batch norm does not help: there it is behind.
#
# That is what batch norm buys here: rates may be larger, and need less search. It is one network, one pass and one
# optimizer. Compared are equal numbers of steps, not equal times: a step with batch norm takes longer. And one
# network's advantage at its best rate says nothing of another's, or of longer trainings.
#
# ## Exercises
#
# 1. Make the network shallow: `DEPTH = 2`. What is left of the difference?
# 2. Initialize badly: `kernel_initializer=keras.initializers.RandomNormal(stddev=0.03)` in place of `"he_normal"`, a
#    quarter of the size or less. How large are the activations of each layer before training, with and without batch
#    norm?
# 3. Take `BATCH_SIZE = 2`. What does batch norm make of two images, and what does that do to training and to the test?
#
# Answers: [answers/what_batch_norm_buys.md](answers/what_batch_norm_buys.md)
