# %% [markdown]
# # 1. MNIST as a graph
#
# TensorFlow 1 separates describing a computation from running it. Steps 2 to 9 describe, as a graph, a network that
# reads digits, and how it learns: they compute nothing. In steps 10 and 11 a session runs parts of the graph.
# After five epochs the network reads 99 % of the test images, in a few minutes on two CPU cores.
#
# Script: `python models/mnist_graph.py`. Notebook of the same text: `models/mnist_graph.ipynb`.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf

import tfops
from trainer.data import load_mnist

EPOCHS = 5
BATCH = 128  # images a step
LEARNING_RATE = 0.002  # at first: it falls to 0 along half a cosine
DROPOUT = 0.3  # the part of the dense layer's outputs that a training step drops
MOMENTUM = 0.8  # of batch norm's moving averages
FOLDER = Path("runs/lessons/mnist_graph")  # checkpoints, logs and pictures

FOLDER.mkdir(parents=True, exist_ok=True)
plt.rc("figure", dpi=80, figsize=(8, 3))
v1 = tf.compat.v1
v1.disable_eager_execution()
v1.set_random_seed(0)

# %% [markdown]
# ## Step 1: data
# Images `[n, 28, 28, 1]` of numbers from 0 to 1, and labels from 0 to 9.

# %%
digits = load_mnist()
x_train, x_test = (x[..., np.newaxis].astype("float32") / 255 for x in (digits.x_train, digits.x_test))
steps = EPOCHS * -(-len(x_train) // BATCH)
print(f"{len(x_train):,} images to train on, {len(x_test):,} to test on, {steps:,} steps")

# %% [markdown]
# ## Step 2: placeholders, for what each run of the session feeds
# The last two have defaults, those for testing.

# %%
images = v1.placeholder(tf.float32, [None, 28, 28, 1])
labels = v1.placeholder(tf.int32, [None])
training = v1.placeholder_with_default(False, [])
dropout = v1.placeholder_with_default(0.0, [])

# %% [markdown]
# ## Step 3: weights and biases
# Batch norm has four vectors per layer: scale and offset are trained, the moving averages of mean and variance are not.
# A layer with batch norm needs no bias: subtracting the mean would remove it, and the offset replaces it.

# %%
shapes = {"conv_1": [3, 3, 1, 32], "conv_2": [3, 3, 32, 64], "dense": [7 * 7 * 64, 128], "logits": [128, 10]}
kernels = {name: v1.get_variable(f"{name}/kernel", shape) for name, shape in shapes.items()}  # uniform (Glorot)
bias = v1.get_variable("logits/bias", initializer=tf.zeros([10]))
norms = {}
for name in ("conv_1", "conv_2", "dense"):
    zeros, ones = tf.zeros(shapes[name][-1:]), tf.ones(shapes[name][-1:])  # an element for each channel
    norms[name] = [
        v1.get_variable(f"{name}/scale", initializer=ones),
        v1.get_variable(f"{name}/offset", initializer=zeros),
        v1.get_variable(f"{name}/moving_mean", initializer=zeros, trainable=False),
        v1.get_variable(f"{name}/moving_variance", initializer=ones, trainable=False),
    ]

# %% [markdown]
# ## Step 4: model
# Batch norm and ReLU are one op. In training it normalizes with the batch's mean and variance, and returns the new
# moving averages; in testing, with the moving averages. The ops that assign them go to the collection `UPDATE_OPS`.

# %%
x = images
for name in ("conv_1", "conv_2", "dense"):
    if name == "dense":
        x = tf.matmul(tf.reshape(x, [-1, 7 * 7 * 64]), kernels[name])
    else:
        x = tf.nn.conv2d(x, kernels[name], strides=1, padding="SAME")
    x, mean, variance = tfops.fused_batch_norm(
        x, *norms[name], is_training=training, exponential_avg_factor=1 - MOMENTUM, activation="relu"
    )
    v1.add_to_collection(v1.GraphKeys.UPDATE_OPS, norms[name][2].assign(mean))
    v1.add_to_collection(v1.GraphKeys.UPDATE_OPS, norms[name][3].assign(variance))
    if name != "dense":
        x = tf.nn.max_pool2d(x, ksize=2, strides=2, padding="VALID")
logits = tf.matmul(tf.nn.dropout(x, rate=dropout), kernels["logits"]) + bias

# %% [markdown]
# ## Steps 5, 6 and 7: loss, optimizer, training op
# The training op depends on the updates of the moving averages. Without that, no run would ever execute them.

# %%
loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
accuracy = tf.reduce_mean(tf.cast(tf.equal(tf.argmax(logits, 1, tf.int32), labels), tf.float32))
step = v1.train.get_or_create_global_step()
optimizer = v1.train.AdamOptimizer(v1.train.cosine_decay(LEARNING_RATE, step, steps))
with tf.control_dependencies(v1.get_collection(v1.GraphKeys.UPDATE_OPS)):
    train = optimizer.minimize(loss, global_step=step)

# %% [markdown]
# ## Steps 8 and 9: initialization, event logs and saver

# %%
initialize = v1.global_variables_initializer()
summary = v1.summary.merge([v1.summary.scalar("loss", loss), v1.summary.scalar("accuracy", accuracy)])
logs = v1.summary.FileWriter(str(FOLDER), v1.get_default_graph())  # tensorboard --logdir FOLDER shows both
saver = v1.train.Saver()

# %% [markdown]
# ## Steps 10 and 11: session, train and test
# Each `session.run` names what it fetches, and feeds the placeholders that this depends on.

# %%
history, random = [], np.random.default_rng(0)
with v1.Session() as session:
    session.run(initialize)
    for epoch in range(EPOCHS):
        for chosen in np.array_split(random.permutation(len(x_train)), steps // EPOCHS):
            feed = {images: x_train[chosen], labels: digits.y_train[chosen], training: True, dropout: DROPOUT}
            _, train_loss, event, moving = session.run([train, loss, summary, norms["conv_1"][2:]], feed)
            logs.add_summary(event, len(history))
            history.append(moving)
        parts = np.array_split(np.arange(len(x_test)), 20)  # test in parts: all images at once need much memory
        right = sum(len(i) * session.run(accuracy, {images: x_test[i], labels: digits.y_test[i]}) for i in parts)
        print(f"Epoch {epoch + 1}: loss of the last batch {train_loss:.4f}, test accuracy {right / len(x_test):.2%}")
    print("Saved:", saver.save(session, str(FOLDER / "model")))
logs.close()

# %%
# The first layer's moving averages, a line for each channel.
figure, axes = plt.subplots(1, 2, layout="constrained")
axes[0].plot([mean for mean, _ in history], linewidth=0.8)
axes[0].set(title="moving mean", xlabel="step")
axes[1].semilogy([variance for _, variance in history], linewidth=0.8)
axes[1].set(title="moving variance", xlabel="step")
figure.savefig(FOLDER / "moving.png")
print("Pictures:", *sorted(path.name for path in FOLDER.glob("*.png")), "in", FOLDER)

# %% [markdown]
# ## Exercises
# 1. Restore the checkpoint in a new session, and let the network read one test image.
# 2. Train without `control_dependencies`. Why does the test accuracy fall, and not the training accuracy?
# 3. Replace `tfops.fused_batch_norm` by `tf.compat.v1.nn.fused_batch_norm` and `tf.nn.relu`. What else must change?
#
# Answers: [answers/mnist_graph.md](answers/mnist_graph.md)
