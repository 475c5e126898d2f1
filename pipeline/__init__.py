"""Neuron Census: what every neuron of many networks looks for, how well the data matches it, and when it fires."""
