"""A net of pznet, and the package that runs it."""

from __future__ import annotations

import torch

# A net of pznet is an extension module beside its weights. This one is a convolution of 3 × 3 × 3
# with zeros around; as the real ones, it keeps its buffers from call to call, writes into the
# folder lib, and ends the process at a wrong size.
ZNET = r"""
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdio.h>
#include <string.h>

enum { Z = 8, Y = 16, X = 16, OUTPUTS = 2, SIZE = Z * Y * X };

typedef struct { PyObject_HEAD float kernel[OUTPUTS][27], bias[OUTPUTS], in[SIZE], out[OUTPUTS * SIZE]; } Net;

static int net_init(Net *self, PyObject *arguments, PyObject *unused) {
    const char *weights, *lib;
    char path[4096];
    if (!PyArg_ParseTuple(arguments, "ss", &weights, &lib)) return -1;
    snprintf(path, sizeof path, "%sconvolution.data", weights);
    FILE *file = fopen(path, "rb");
    if (!file) { PyErr_SetFromErrnoWithFilename(PyExc_OSError, path); return -1; }
    size_t read = fread(self->kernel, sizeof(float), OUTPUTS * 27, file)
        + fread(self->bias, sizeof(float), OUTPUTS, file);
    fclose(file);
    if (read != OUTPUTS * 28) { PyErr_SetString(PyExc_ValueError, "weights are short"); return -1; }
    snprintf(path, sizeof path, "%s/layer.so", lib);
    if (!(file = fopen(path, "wb"))) { PyErr_SetFromErrnoWithFilename(PyExc_OSError, path); return -1; }
    fclose(file);
    return 0;
}

static float at(const float *in, int z, int y, int x) {
    return z < 0 || z >= Z || y < 0 || y >= Y || x < 0 || x >= X ? 0 : in[(z * Y + y) * X + x];
}

static PyObject *net_forward(Net *self, PyObject *patch) {
    Py_buffer view;
    if (PyObject_GetBuffer(patch, &view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT)) return NULL;
    if (strcmp(view.format, "f") || view.len != SIZE * sizeof(float)) { fprintf(stderr, "wrong size\n"); exit(1); }
    memcpy(self->in, view.buf, view.len);
    PyBuffer_Release(&view);
    for (int c = 0; c < OUTPUTS; c++)
        for (int z = 0; z < Z; z++) for (int y = 0; y < Y; y++) for (int x = 0; x < X; x++) {
            float sum = self->bias[c];
            for (int k = 0; k < 27; k++)
                sum += self->kernel[c][k] * at(self->in, z + k / 9 - 1, y + k / 3 % 3 - 1, x + k % 3 - 1);
            self->out[((c * Z + z) * Y + y) * X + x] = sum;
        }
    PyObject *numpy = PyImport_ImportModule("numpy");
    if (!numpy) return NULL;
    PyObject *memory = PyMemoryView_FromMemory((char *)self->out, sizeof self->out, PyBUF_READ);
    PyObject *flat = PyObject_CallMethod(numpy, "frombuffer", "Os", memory, "float32");
    PyObject *shaped = flat ? PyObject_CallMethod(flat, "reshape", "iiiii", 1, OUTPUTS, Z, Y, X) : NULL;
    Py_XDECREF(flat); Py_XDECREF(memory); Py_DECREF(numpy);
    return shaped;
}

static PyObject *net_in_shape(Net *self, PyObject *unused) { return Py_BuildValue("[iiiii]", 1, 1, Z, Y, X); }

static PyMethodDef methods[] = {
    {"forward", (PyCFunction)net_forward, METH_O, ""},
    {"get_in_shape", (PyCFunction)net_in_shape, METH_NOARGS, ""}, {0}};
static PyTypeObject type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "znet.znet", .tp_basicsize = sizeof(Net), .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = PyType_GenericNew, .tp_init = (initproc)net_init, .tp_methods = methods};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "znet", "", -1};

PyMODINIT_FUNC PyInit_znet(void) {
    PyObject *made = PyModule_Create(&module);
    return made && PyModule_AddType(made, &type) == 0 ? made : NULL;
}
"""

PZNET = """
import os, sys

class PZNet:
    def __init__(self, net_path, lib_path=None):
        lib_path = lib_path or os.path.join(net_path, "lib")
        os.makedirs(lib_path, exist_ok=True)
        sys.path.append(net_path)
        import znet
        self.net = znet.znet(os.path.join(net_path, "weights/"), lib_path)

    @property
    def in_shape(self):
        return self.net.get_in_shape()

    def forward(self, patch):
        return self.net.forward(patch)
"""


def convolution() -> torch.nn.Conv3d:
    torch.manual_seed(11)
    return torch.nn.Conv3d(1, 2, 3, padding=1).eval()
