"""What keras_lora needs of Keras that Keras does not make public, in one place.

There is no public way to add state to a built layer (keras issue 18601), to take
it away again, or to freeze one variable of a layer for good.
"""
