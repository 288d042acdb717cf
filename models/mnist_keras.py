# %% [markdown]
# # 2. MNIST in Keras
#
# The network of lesson 1, in six parts: import, data, model, compile, fit, evaluate. Keras has the loop, the moving
# averages and the session's work. It reads 99 % of the test images after a few minutes on two CPU cores.
#
# Script: `python models/mnist_keras.py`. Notebook of the same text: `models/mnist_keras.ipynb`.

# %%
from pathlib import Path

import keras
import matplotlib.pyplot as plt
import numpy as np

import tfops.keras
from trainer.data import load_mnist

EPOCHS = 5
BATCH = 128  # images a step
LEARNING_RATE = 0.002  # at first: it falls to 0 along half a cosine
DROPOUT = 0.3  # the part of the dense layer's outputs that a training step drops
MOMENTUM = 0.8  # of batch norm's moving averages
FOLDER = Path("runs/lessons/mnist_keras")  # pictures

FOLDER.mkdir(parents=True, exist_ok=True)
plt.rc("figure", dpi=80, figsize=(8, 3))
keras.utils.set_random_seed(0)

# %% [markdown]
# ## Data: images `[n, 28, 28, 1]` from 0 to 1, and labels from 0 to 9

# %%
digits = load_mnist()
x_train, x_test = (x[..., np.newaxis].astype("float32") / 255 for x in (digits.x_train, digits.x_test))
print(f"{len(x_train):,} images to train on, {len(x_test):,} to test on")

# %% [markdown]
# ## Model: batch norm and ReLU are one layer, and replace the bias of the layer before

# %%
model = keras.Sequential([keras.Input((28, 28, 1))])
for filters in (32, 64):
    model.add(keras.layers.Conv2D(filters, 3, padding="same", use_bias=False))
    model.add(tfops.keras.BatchNormalization(momentum=MOMENTUM, activation="relu"))
    model.add(keras.layers.MaxPooling2D())
model.add(keras.layers.Flatten())
model.add(keras.layers.Dense(128, use_bias=False))
model.add(tfops.keras.BatchNormalization(momentum=MOMENTUM, activation="relu"))
model.add(keras.layers.Dropout(DROPOUT))
model.add(keras.layers.Dense(10))  # logits

# %% [markdown]
# ## Compile, fit, evaluate

# %%
rate = keras.optimizers.schedules.CosineDecay(LEARNING_RATE, EPOCHS * -(-len(x_train) // BATCH))
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile(keras.optimizers.Adam(rate), loss, metrics=["accuracy"])
tests = (x_test, digits.y_test)
history = model.fit(x_train, digits.y_train, BATCH, EPOCHS, validation_data=tests, verbose=2).history
print(f"Test accuracy: {model.evaluate(*tests, verbose=0)[1]:.2%}")

# %%
figure, axes = plt.subplots(1, 2, layout="constrained")
for each, name in zip(axes, ("loss", "accuracy"), strict=True):
    each.plot(range(1, EPOCHS + 1), np.transpose([history[name], history[f"val_{name}"]]), marker="o")
    each.set(title=name, xlabel="epoch")
    each.legend(["training", "test"])
figure.savefig(FOLDER / "curves.png")
print("Pictures:", *sorted(path.name for path in FOLDER.glob("*.png")), "in", FOLDER)

# %% [markdown]
# ## Exercises
# 1. Replace tfops' layer by Keras' own and a ReLU. Compare accuracy, time per step, and the number of parameters.
# 2. Show the test images that the model gets wrong, with what it says and what they are.
# 3. Save the model, and load it where tfops is not installed. Which layer has to be changed for that?
#
# Answers: [answers/mnist_keras.md](answers/mnist_keras.md)
