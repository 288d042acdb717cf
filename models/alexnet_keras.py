# %% [markdown]
# # 4. AlexNet in Keras: the assignment
#
# The network of lesson 3 with Keras' functional API, which calls layers on tensors: a Sequential model could not split
# and join channels. It trains on a part of MNIST, enlarged, in a few minutes on two CPU cores, or on your own photos.
# The assignment is the first exercise: does batch norm do better than local response normalization?
#
# Script: `python models/alexnet_keras.py`. Notebook of the same text: `models/alexnet_keras.ipynb`.

# %%
from pathlib import Path

import keras
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf

import tfops.keras
from trainer.data import load_mnist

NORM = "batch"  # or "lrn", the paper's local response normalization, or None
IMAGE_SIZE = 67  # the paper's is 227; with less than 67 nothing is left for the last pooling
WIDTH = 0.25  # of every layer, as a part of the paper's; 1 is the paper's
IMAGES = 20_000  # to train on, at most
EPOCHS = 2
BATCH = 128  # images a step
LEARNING_RATE = 0.01  # a tenth of it after 60 % of the steps, a hundredth after 85 %
WEIGHT_DECAY = 0.0005
DROPOUT = 0.5
MOMENTUM = 0.9  # of the optimizer, and of batch norm's moving averages
FOLDER = Path("runs/lessons/alexnet_keras")  # pictures

FOLDER.mkdir(parents=True, exist_ok=True)
plt.rc("figure", dpi=80, figsize=(8, 3))
keras.utils.set_random_seed(0)

# %% [markdown]
# ## Data
# Batches of images `[n, 67, 67, 3]`, from 0 to 1, and labels. Digits are enlarged and get three colors. For photos in a
# folder for each class, `keras.utils.image_dataset_from_directory("photos", ...)` makes the datasets: see answer 3.

# %%
digits = load_mnist()
x_train, y_train, x_test, y_test = digits.x_train[:IMAGES], digits.y_train[:IMAGES], digits.x_test, digits.y_test
print(f"{len(x_train):,} images to train on, {len(x_test):,} to test on")


def enlarge(images, labels):
    images = tf.image.resize(tf.cast(images, tf.float32)[..., tf.newaxis] / 255, [IMAGE_SIZE, IMAGE_SIZE])
    return tf.image.grayscale_to_rgb(images), labels


train = tf.data.Dataset.from_tensor_slices((x_train, y_train)).shuffle(len(x_train), seed=0)
test = tf.data.Dataset.from_tensor_slices((x_test, y_test))
train, test = (dataset.batch(BATCH).map(enlarge).prefetch(2) for dataset in (train, test))

# %% [markdown]
# ## Model
# The second, fourth and fifth convolution have two groups. Keras' `Conv2D` has groups, but TensorFlow no gradient for
# them on a CPU, so each group is a layer of its own. Batch norm, with ReLU in it, replaces the paper's normalization.

# %%
decay = keras.regularizers.L2(WEIGHT_DECAY / 2)
inputs = x = keras.Input((IMAGE_SIZE, IMAGE_SIZE, 3))
for i, (filters, size, groups) in enumerate([(96, 11, 1), (256, 5, 2), (384, 3, 1), (384, 3, 2), (256, 3, 2)]):
    convolve = {"strides": 4 if i == 0 else 1, "padding": "valid" if i == 0 else "same", "kernel_regularizer": decay}
    normalized = NORM == "batch" and i < 2
    part = x.shape[-1] // groups
    outputs = [
        keras.layers.Conv2D(int(WIDTH * filters) // groups, size, use_bias=not normalized, **convolve)(each)
        for each in (x[..., :part], x[..., part:])[:groups]
    ]
    x = keras.layers.Concatenate()(outputs) if groups == 2 else outputs[0]
    if normalized:
        x = tfops.keras.BatchNormalization(momentum=MOMENTUM, activation="relu")(x)
    else:
        x = keras.layers.ReLU()(x)
    if NORM == "lrn" and i < 2:
        x = keras.layers.Lambda(lambda x: tf.nn.local_response_normalization(x, 2, bias=2, alpha=1e-4, beta=0.75))(x)
    if i in (0, 1, 4):
        x = keras.layers.MaxPooling2D(3, 2)(x)
x = keras.layers.Flatten()(x)
for _ in range(2):
    x = keras.layers.Dense(int(WIDTH * 4096), activation="relu", kernel_regularizer=decay)(x)
    x = keras.layers.Dropout(DROPOUT)(x)
model = keras.Model(inputs, keras.layers.Dense(10, kernel_regularizer=decay)(x))
print(f"{model.count_params():,} parameters")

# %% [markdown]
# ## Compile, fit, evaluate

# %%
steps = EPOCHS * int(train.cardinality())
rates = [LEARNING_RATE, LEARNING_RATE / 10, LEARNING_RATE / 100]
rate = keras.optimizers.schedules.PiecewiseConstantDecay([int(0.6 * steps), int(0.85 * steps)], rates)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile(keras.optimizers.SGD(rate, momentum=MOMENTUM), loss, metrics=["accuracy"])
history = model.fit(train, epochs=EPOCHS, validation_data=test, shuffle=False, verbose=2).history
print(f"Test accuracy: {model.evaluate(test, verbose=0)[1]:.2%}")

# %%
# Test images that it got wrong, with what it said and what they are.
said = model.predict(test, verbose=0).argmax(-1)
wrong = np.flatnonzero(said != y_test)[:20]
figure, axes = plt.subplots(2, 10, layout="constrained")
for each in axes.flat:
    each.axis("off")
for each, i in zip(axes.flat, wrong, strict=False):
    each.imshow(x_test[i], cmap="gray_r")
    each.set_title(f"{said[i]}, not {y_test[i]}", fontsize=8)
figure.savefig(FOLDER / "wrong.png")
print("Pictures:", *sorted(path.name for path in FOLDER.glob("*.png")), "in", FOLDER)

# %% [markdown]
# ## Exercises
# 1. Assignment: train with `NORM = "lrn"` and `NORM = None` too. Compare losses and accuracies after each epoch.
# 2. Write local response normalization in NumPy, and check it against TensorFlow's.
# 3. Train on photos of your own.
#
# Answers: [answers/alexnet_keras.md](answers/alexnet_keras.md)
