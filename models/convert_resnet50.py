# %% [markdown]
# # 6. Convert a ResNet-50, and measure
#
# You take a network that somebody else has written, `keras.applications.ResNet50`, replace its 53 batch norms by fused
# ones in one line, see that it computes the same, measure what that saves, save and load it, and go back to Keras. It
# takes some three minutes.
#
# This file is a script, `python models/convert_resnet50.py`, and a notebook, `models/convert_resnet50.ipynb`, of the
# same text.

# %%
import os
import tempfile
import time
from pathlib import Path

import keras
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf

import tfops.keras

QUICK = "LESSON_QUICK" in os.environ  # set by the tests: a few steps only
FOLDER = Path("runs/lessons/convert_resnet50")  # the picture goes there
IMAGE_SIZE = 64 if QUICK else 128  # height and width; ImageNet's usual 224 takes three times as long
BATCH_SIZE = 2 if QUICK else 16
WARM_UP = 0 if QUICK else 1  # rounds that are not counted
ROUNDS = 1 if QUICK else 7  # in each, one step of each model

FOLDER.mkdir(parents=True, exist_ok=True)
plt.rc("figure", dpi=80, figsize=(8, 3))
tf.config.run_functions_eagerly(QUICK)  # tracing takes most of a test's time
keras.utils.set_random_seed(1)
images = tf.random.normal([BATCH_SIZE, IMAGE_SIZE, IMAGE_SIZE, 3])
labels = tf.random.uniform([BATCH_SIZE], maxval=1000, dtype=tf.int32)

# %% [markdown]
# ## The model
#
# With `weights="imagenet"` Keras downloads trained weights (about 100 MB; `input_shape` must then be left out, or
# `include_top=False` be given). Random ones do here: batch norm costs the same with any.

# %%
shape = (IMAGE_SIZE, IMAGE_SIZE, 3)
model = keras.applications.ResNet50(weights=None, input_shape=shape, classifier_activation=None)
kinds = [type(layer).__name__ for layer in model.layers]
print({kind: kinds.count(kind) for kind in ("Conv2D", "BatchNormalization", "Activation", "Add")})
print(f"{model.count_params():,} parameters")

# %% [markdown]
# ## Convert
#
# In a residual block, activations and additions follow batch norms. Each is a pass over a tensor that does little
# arithmetic, so its time goes to memory. `convert` makes a copy of the model in which batch norm takes in what follows.

# %%
fused = tfops.keras.convert(model)

# %% [markdown]
# Four batch norms stay alone: at the beginning of a stage the shortcut has a batch norm too. An addition can be taken
# in by one of its two operands. With `verbose=2` there is a line for every batch norm. Here are those of the first
# block, whose output is the layer `conv2_block1_out`:

# %%
block = keras.Model(model.input, model.get_layer("conv2_block1_out").output, name="first_block")
fused_block = tfops.keras.convert(block, verbose=2)

# %% [markdown]
# ## Does it compute the same?
#
# The order of roundings differs, so look at differences beside the largest output. In training batch norm normalizes by
# the batch's statistics, in inference by the moving averages: compare both.

# %%
for training in (False, True):
    stock_logits, fused_logits = model(images, training=training), fused(images, training=training)
    largest = float(tf.reduce_max(tf.abs(stock_logits)))
    difference = float(tf.reduce_max(tf.abs(stock_logits - fused_logits)))
    print(f"training={training}: largest logit {largest:.3g}, largest difference {difference / largest:.0e} of it")

# %% [markdown]
# ## Measure
#
# Time depends on what else the machine does, on its temperature, on what is in the caches. So the two models take
# turns, the first rounds, which trace and allocate, are not counted, and the result is the median over the rounds of
# the ratio within a round. A training step ends with the optimizer's update, so that no gradient is left out.


# %%
def training_step(model):
    optimizer = keras.optimizers.SGD(1e-6)  # so small that the weights hardly change
    optimizer.build(model.trainable_variables)

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            logits = model(images, training=True)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        return loss

    return step


def inference(model):
    return tf.function(lambda: model(images, training=False))


def measure(stock_call, fused_call):
    times = []
    for _ in range(WARM_UP + ROUNDS):
        pair = []
        for call in (stock_call, fused_call):
            start = time.perf_counter()
            np.asarray(call())  # waits for the result, on a GPU too
            pair.append(1000 * (time.perf_counter() - start))
        times.append(pair)
    return np.array(times[WARM_UP:])


times = {
    "training step": measure(training_step(model), training_step(fused)),
    "inference": measure(inference(model), inference(fused)),
}

figure, panels = plt.subplots(1, 2, layout="constrained")
for axes, (name, measured) in zip(panels, times.items(), strict=True):
    before, after = np.median(measured, axis=0)
    ratio = np.median(measured[:, 0] / measured[:, 1])
    print(f"{name}: {before:.0f} ms with Keras' batch norm, {after:.0f} ms with tfops', {ratio:.2f} times as fast")
    axes.plot(measured, "o", label=["Keras", "tfops"])
    axes.set(title=name, xlabel="round", ylabel="ms", ylim=(0, None))
panels[0].legend()
figure.savefig(FOLDER / "times.png")

# %% [markdown]
# When the notebook was made, other programs shared the two cores: hence the scatter. Two dots of a round can still be
# compared.
#
# The convolutions take the rest of the step, and they are the same in both: how much is won depends on how fast they
# are. The documentation's page on performance has steps of several networks on several machines.
#
# `convert` also copies what `compile` has set, with the optimizer's state, so training can go on with `fused.fit(...)`
# where the other model has stopped.
#
# ## Save, load, and go back
#
# Layers keep their names and weights, so weights files fit both models. A `.keras` file of the fused model needs
# `import tfops.keras` before it is loaded. Where tfops is not installed, convert back first: also for TFLite and ONNX,
# which do not know its op.

# %%
stock = tfops.keras.convert(fused, to="keras")
with tempfile.TemporaryDirectory() as folder:
    fused.save(Path(folder) / "fused.keras")
    loaded = keras.models.load_model(Path(folder) / "fused.keras")
    fused.save_weights(Path(folder) / "fused.weights.h5")
    model.load_weights(Path(folder) / "fused.weights.h5")

expected = fused(images, training=False)
for name, other in (("loaded", loaded), ("converted back", stock), ("with the weights of the fused one", model)):
    difference = tf.reduce_max(tf.abs(other(images, training=False) - expected)) / tf.reduce_max(tf.abs(expected))
    count = sum(isinstance(layer, tfops.keras.BatchNormalization) for layer in other.layers)
    print(f"{name}: {count} fused batch norms, largest difference {float(difference):.0e} of the largest logit")
print("Pictures:", *sorted(path.name for path in FOLDER.glob("*.png")), "in", FOLDER)

# %% [markdown]
# ## Exercises
#
# 1. How much comes from the faster kernel, and how much from what it takes in? Measure `convert(model, fold=False)`
#    too.
# 2. Convert a `keras.Sequential` of your own, with batch norm *after* the activation. What does `verbose=2` say, and
#    why can the activation not be taken in?
# 3. Predict, then measure: in which of MobileNetV2 and VGG16 does `convert` save more?
#
# Answers: [answers/convert_resnet50.md](answers/convert_resnet50.md)
