# %% [markdown]
# # 3. AlexNet as a graph
#
# The network of A. Krizhevsky, I. Sutskever and G. Hinton, "ImageNet Classification with Deep Convolutional Neural
# Networks", 2012, in the eleven steps of lesson 1. New are layers in two groups, overlapping pooling, momentum, weight
# decay, and a choice: batch norm, or the paper's local response normalization. A part of it trains on a part of MNIST,
# enlarged, in a few minutes on two CPU cores.
#
# Script: `python models/alexnet_graph.py`. Notebook of the same text: `models/alexnet_graph.ipynb`.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf

import tfops
from trainer.data import load_mnist

NORM = "batch"  # or "lrn", the paper's local response normalization, or None
IMAGE_SIZE = 67  # the paper's is 227; with less than 67 nothing is left for the last pooling
WIDTH = 0.25  # of every layer, as a part of the paper's; at most 1
IMAGES = 20_000  # to train on, at most
EPOCHS = 2
BATCH = 128  # images a step
LEARNING_RATE = 0.01  # a tenth of it after 60 % of the steps, a hundredth after 85 %
WEIGHT_DECAY = 0.0005
DROPOUT = 0.5
MOMENTUM = 0.9  # of the optimizer, and of batch norm's moving averages
FOLDER = Path("runs/lessons/alexnet_graph")  # checkpoints, logs and pictures

FOLDER.mkdir(parents=True, exist_ok=True)
plt.rc("figure", dpi=80, figsize=(8, 3))
v1 = tf.compat.v1
v1.disable_eager_execution()
v1.set_random_seed(0)

# %% [markdown]
# ## Steps 1 and 2: data, placeholders
# The network is for photos: the graph enlarges the digits and gives them three colors. Lesson 4 reads photos.

# %%
digits = load_mnist()
x_train, y_train, x_test, y_test = digits.x_train[:IMAGES], digits.y_train[:IMAGES], digits.x_test, digits.y_test
steps = EPOCHS * -(-len(x_train) // BATCH)
print(f"{len(x_train):,} images to train on, {len(x_test):,} to test on, {steps:,} steps")

images = v1.placeholder(tf.uint8, [None, 28, 28])
labels = v1.placeholder(tf.int32, [None])
training = v1.placeholder_with_default(False, [])
dropout = v1.placeholder_with_default(0.0, [])
x = tf.image.resize(tf.cast(images, tf.float32)[..., tf.newaxis] / 255, [IMAGE_SIZE, IMAGE_SIZE])
photos = tf.image.grayscale_to_rgb(x)

# %% [markdown]
# ## Step 3: weights and biases
# The second, fourth and fifth convolution have two groups: each half of the filters sees one half of the channels. That
# way the paper's network was spread over two GPUs. The first two have batch norm, whose offset replaces the bias.

# %%
filters = [int(WIDTH * n) for n in (96, 256, 384, 384, 256)]  # even numbers, for the groups
sizes, groups = (11, 5, 3, 3, 3), (1, 2, 1, 2, 2)
kernels, biases, norms = [], [], []
for i in range(5):
    inputs = [3, *filters][i] // groups[i]
    kernels.append(v1.get_variable(f"conv_{i + 1}/kernel", [sizes[i], sizes[i], inputs, filters[i]]))
    if NORM == "batch" and i < 2:
        scale = v1.get_variable(f"conv_{i + 1}/scale", initializer=tf.ones(filters[i]))
        offset = v1.get_variable(f"conv_{i + 1}/offset", initializer=tf.zeros(filters[i]))
        mean = v1.get_variable(f"conv_{i + 1}/moving_mean", initializer=tf.zeros(filters[i]), trainable=False)
        variance = v1.get_variable(f"conv_{i + 1}/moving_variance", initializer=tf.ones(filters[i]), trainable=False)
        norms.append([scale, offset, mean, variance])
        biases.append(0.0)
    else:
        biases.append(v1.get_variable(f"conv_{i + 1}/bias", initializer=tf.zeros(filters[i])))

# %% [markdown]
# ## Step 4: model
# `tf.nn.conv2d` has groups, but no gradient for them on a CPU, so each group is a convolution of its own. The windows
# of the pooling overlap: they are 3 pixels wide and 2 apart. Local response normalization divides each element a by
# $(2 + 10^{-4} \sum a^2)^{0.75}$, the sum over five neighboring channels. TensorFlow's `alpha` is the paper's.

# %%
x = photos
for i in range(5):
    parts = zip(tf.split(x, groups[i], axis=3), tf.split(kernels[i], groups[i], axis=3), strict=True)
    strides, padding = (4, "VALID") if i == 0 else (1, "SAME")
    x = tf.concat([tf.nn.conv2d(part, kernel, strides, padding) for part, kernel in parts], axis=3) + biases[i]
    if NORM == "batch" and i < 2:
        x, mean, variance = tfops.fused_batch_norm(
            x, *norms[i], is_training=training, exponential_avg_factor=1 - MOMENTUM, activation="relu"
        )
        v1.add_to_collection(v1.GraphKeys.UPDATE_OPS, norms[i][2].assign(mean))
        v1.add_to_collection(v1.GraphKeys.UPDATE_OPS, norms[i][3].assign(variance))
    else:
        x = tf.nn.relu(x)
        if NORM == "lrn" and i < 2:
            x = tf.nn.local_response_normalization(x, depth_radius=2, bias=2, alpha=1e-4, beta=0.75)
    if i in (0, 1, 4):
        x = tf.nn.max_pool2d(x, ksize=3, strides=2, padding="VALID")
x = tf.reshape(x, [-1, np.prod(x.shape[1:])])
for name, units in (("dense_1", int(WIDTH * 4096)), ("dense_2", int(WIDTH * 4096)), ("logits", 10)):
    kernels.append(v1.get_variable(f"{name}/kernel", [x.shape[1], units]))
    x = tf.matmul(x, kernels[-1]) + v1.get_variable(f"{name}/bias", initializer=tf.zeros([units]))
    if name != "logits":
        x = tf.nn.dropout(tf.nn.relu(x), rate=dropout)
logits = x
print(f"{sum(np.prod(each.shape) for each in v1.trainable_variables()):,} trained parameters")

# %% [markdown]
# ## Steps 5 to 9: loss, optimizer, training op, initialization, event logs and saver
# Weight decay is a part of what the optimizer minimizes; the loss that is printed goes without.

# %%
loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
decay = WEIGHT_DECAY * tf.add_n([tf.nn.l2_loss(kernel) for kernel in kernels])
accuracy = tf.reduce_mean(tf.cast(tf.equal(tf.argmax(logits, 1, tf.int32), labels), tf.float32))
step = v1.train.get_or_create_global_step()
rates = [LEARNING_RATE, LEARNING_RATE / 10, LEARNING_RATE / 100]
rate = v1.train.piecewise_constant(step, [int(0.6 * steps), int(0.85 * steps)], rates)
with tf.control_dependencies(v1.get_collection(v1.GraphKeys.UPDATE_OPS)):
    train = v1.train.MomentumOptimizer(rate, MOMENTUM).minimize(loss + decay, global_step=step)
initialize = v1.global_variables_initializer()
summary = v1.summary.merge([v1.summary.scalar("loss", loss), v1.summary.scalar("accuracy", accuracy)])
logs = v1.summary.FileWriter(str(FOLDER), v1.get_default_graph())
saver = v1.train.Saver()

# %% [markdown]
# ## Steps 10 and 11: session, train and test

# %%
random = np.random.default_rng(0)
with v1.Session() as session:
    session.run(initialize)
    for epoch in range(EPOCHS):
        for chosen in np.array_split(random.permutation(len(x_train)), steps // EPOCHS):
            feed = {images: x_train[chosen], labels: y_train[chosen], training: True, dropout: DROPOUT}
            _, train_loss, event = session.run([train, loss, summary], feed)
            logs.add_summary(event, session.run(step))
        parts = np.array_split(np.arange(len(x_test)), 20)
        right = sum(len(i) * session.run(accuracy, {images: x_test[i], labels: y_test[i]}) for i in parts)
        print(f"Epoch {epoch + 1}: loss of the last batch {train_loss:.4f}, test accuracy {right / len(x_test):.2%}")
    print("Saved:", saver.save(session, str(FOLDER / "model")))
    first = session.run(kernels[0])
logs.close()

# %%
# The filters of the first convolution, 11x11 pixels. Digits are gray, so a filter acts as the sum of its three colors.
figure, axes = plt.subplots(3, len(first.T) // 3, layout="constrained")
for each, kernel in zip(axes.flat, np.moveaxis(first, -1, 0), strict=False):
    each.imshow(kernel.sum(2), cmap="gray")
    each.axis("off")
figure.savefig(FOLDER / "filters.png")
print("Pictures:", *sorted(path.name for path in FOLDER.glob("*.png")), "in", FOLDER)

# %% [markdown]
# ## Exercises
# 1. Count the paper's parameters: without batch norm, with `WIDTH = 1`, `IMAGE_SIZE = 227` and 1,000 classes.
# 2. What do the groups save? Count again with all of `groups` 1.
# 3. Give all five convolutions batch norm. What has to change in steps 3 and 4?
#
# Answers: [answers/alexnet_graph.md](answers/alexnet_graph.md)
