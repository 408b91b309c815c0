//! Delivered batches as Python objects.
//!
//! No copy is made. The memory goes back to its owner when the last view of it dies.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr;
use std::sync::Arc;

use forebay::batch_source::split::BatchPart;
use forebay::loader::{Field, FieldMemory};
use forebay::tokens::{Dtype, DtypeKind};
use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyDict, PyList, PyString, PyTuple};

use crate::pass::Owner;

/// A batch that was handed to Python, or the rows of one consumer in it.
#[pyclass(frozen, module = "forebay._core")]
pub(crate) struct Batch {
    inner: Arc<forebay::Batch>,
    fields: Arc<[Field]>,
    rows: usize,
    /// Number of the consumer among those that share the batch.
    part: usize,
    max_seqlen: Option<u64>,
}

/// Length of the longest span in the rows of `batch`.
pub(crate) fn max_seqlen(batch: &forebay::Batch) -> Option<u64> {
    batch.borders.as_deref()?.iter().map(|borders| borders.longest).max()
}

impl Batch {
    pub(crate) fn new(inner: Arc<forebay::Batch>) -> Self {
        Self { fields: Arc::clone(&inner.fields), rows: inner.rows, part: 0, max_seqlen: max_seqlen(&inner), inner }
    }

    pub(crate) fn part(part: BatchPart) -> Self {
        let BatchPart { batch, fields, rows, part, max_seqlen } = part;
        Self { inner: batch, fields, rows, part, max_seqlen }
    }
}

#[pymethods]
impl Batch {
    #[getter]
    fn epoch(&self) -> u64 {
        self.inner.epoch
    }

    #[getter]
    fn step(&self) -> u64 {
        self.inner.step
    }

    #[getter]
    fn rows(&self) -> usize {
        self.rows
    }

    /// The object that the buffer was submitted with. None for memory of forebay's pool.
    #[getter]
    fn owner(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        self.inner.owner()?.downcast_ref::<Owner>()?.object(py)
    }

    #[getter]
    fn address(&self) -> usize {
        self.inner.as_ptr() as usize
    }

    fn fields(&self) -> Vec<(&'static str, Array)> {
        self.fields.iter().map(|field| (field.name, Array::new(&self.inner, *field))).collect()
    }

    /// Makes tensors of the arrays, of the library that `tensors` belongs to. Returns them by name.
    fn tensors<'py>(&self, py: Python<'py>, tensors: &Tensors) -> PyResult<Bound<'py, PyDict>> {
        let dict = tensors.of(py, &self.inner, &self.fields)?;
        add_facts(&dict, &self.inner, self.part, self.max_seqlen)?;
        Ok(dict)
    }

    /// The values that no array holds, by name: `max_seqlen`, and strings of documents. None if
    /// there are none.
    fn facts<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyDict>>> {
        if self.max_seqlen.is_none() && self.inner.documents.is_none() {
            return Ok(None);
        }
        let dict = PyDict::new(py);
        add_facts(&dict, &self.inner, self.part, self.max_seqlen)?;
        Ok(Some(dict))
    }

    /// The arrays that lie beside the buffer: the numbers of documents.
    fn beside(&self) -> Vec<(&'static str, Array)> {
        let beside = self.fields.iter().filter(|field| field.memory == FieldMemory::Documents);
        beside.map(|field| (field.name, Array::new(&self.inner, *field))).collect()
    }

    /// Name, dtype, offset in bytes and shape of each array in the buffer, for a caller that
    /// submitted the buffer.
    fn layout(&self) -> Vec<(&'static str, &'static str, usize, Vec<usize>)> {
        let fields = self.fields.iter().filter(|field| field.memory == FieldMemory::Buffer);
        fields.map(|f| (f.name, f.dtype.name(), f.offset_bytes, f.shape[..f.ndim].to_vec())).collect()
    }
}

/// One array of a batch, with the buffer protocol and DLPack.
#[pyclass(frozen, module = "forebay._core")]
pub(crate) struct Array {
    batch: Arc<forebay::Batch>,
    field: Field,
    // Buffer views point to these two fields, and hold the object that contains them.
    shape: [ffi::Py_ssize_t; 4],
    strides_bytes: [ffi::Py_ssize_t; 4],
}

impl Array {
    fn new(batch: &Arc<forebay::Batch>, field: Field) -> Self {
        let size = field.dtype.size();
        Self {
            batch: Arc::clone(batch),
            field,
            shape: field.shape.map(|count| count as ffi::Py_ssize_t),
            strides_bytes: strides(&field).map(|stride| (stride * size) as ffi::Py_ssize_t),
        }
    }

    fn start(&self) -> *mut u8 {
        field_start(&self.batch, &self.field)
    }

    /// Whether the columns follow each other without gaps, as in Fortran. The rows always do.
    fn is_column_contiguous(&self) -> bool {
        self.field.shape.iter().filter(|len| **len > 1).count() <= 1
    }
}

/// Number of values from one place of each axis to the next.
fn strides(field: &Field) -> [usize; 4] {
    let [_, second, third, fourth] = field.shape;
    [second * third * fourth, third * fourth, fourth, 1]
}

fn field_start(batch: &forebay::Batch, field: &Field) -> *mut u8 {
    batch.start_of(field)
}

/// The format of the `struct` module that NumPy reads as its own type of that width.
fn format_of(dtype: Dtype) -> &'static CStr {
    match (dtype.kind(), dtype.size()) {
        (DtypeKind::Bool, _) => c"?",
        (DtypeKind::Float, 2) => c"e",
        (DtypeKind::Float, 4) => c"f",
        (DtypeKind::Float, _) => c"d",
        (DtypeKind::Unsigned, 1) => c"B",
        (DtypeKind::Unsigned, 2) => c"H",
        (DtypeKind::Unsigned, 4) => c"I",
        (DtypeKind::Unsigned, _) if size_of::<std::ffi::c_long>() == 8 => c"L",
        (DtypeKind::Unsigned, _) => c"Q",
        (DtypeKind::Signed, 1) => c"b",
        (DtypeKind::Signed, 2) => c"h",
        (DtypeKind::Signed, 4) => c"i",
        (DtypeKind::Signed, _) if size_of::<std::ffi::c_long>() == 8 => c"l",
        (DtypeKind::Signed, _) => c"q",
    }
}

#[pymethods]
impl Array {
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.field.shape[..self.field.ndim])
    }

    #[getter]
    fn dtype(&self) -> &'static str {
        self.field.dtype.name()
    }

    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        if view.is_null() {
            return Err(PyBufferError::new_err("no view was given to fill"));
        }
        let array = slf.get();
        let asks = |flag: c_int| flags & flag == flag;
        if asks(ffi::PyBUF_F_CONTIGUOUS) && !array.is_column_contiguous() {
            return Err(PyBufferError::new_err(
                "this array's columns lie apart in memory: ask for rows, or copy it first",
            ));
        }
        let size = array.field.dtype.size();
        // SAFETY: `view` is valid and may be filled here (buffer protocol). Shape, strides and
        // memory live as long as the object that `obj` keeps. The format is static.
        unsafe {
            (*view).buf = array.start().cast::<c_void>();
            (*view).len = (array.field.shape[0] * array.field.row_len() * size) as ffi::Py_ssize_t;
            (*view).itemsize = size as ffi::Py_ssize_t;
            (*view).readonly = 0;
            (*view).ndim = array.field.ndim as c_int;
            (*view).format = if asks(ffi::PyBUF_FORMAT) {
                format_of(array.field.dtype).as_ptr().cast_mut()
            } else {
                ptr::null_mut()
            };
            (*view).shape = if asks(ffi::PyBUF_ND) { array.shape.as_ptr().cast_mut() } else { ptr::null_mut() };
            (*view).strides =
                if asks(ffi::PyBUF_STRIDES) { array.strides_bytes.as_ptr().cast_mut() } else { ptr::null_mut() };
            (*view).suboffsets = ptr::null_mut();
            (*view).internal = ptr::null_mut();
            (*view).obj = slf.into_any().into_ptr();
        }
        Ok(())
    }

    #[pyo3(signature = (*, stream=None, max_version=None, dl_device=None, copy=None))]
    fn __dlpack__<'py>(
        &self,
        py: Python<'py>,
        stream: Option<&Bound<'py, PyAny>>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(c_int, c_int)>,
        copy: Option<bool>,
    ) -> PyResult<Bound<'py, PyAny>> {
        // Every consumer understands the format without a version.
        let _ = max_version;
        if stream.is_some() {
            return Err(PyBufferError::new_err("`stream` must be None: the array is in host memory"));
        }
        if dl_device.is_some_and(|device| device != DEVICE) {
            return Err(PyBufferError::new_err(
                "the array is in host memory and does not go to another device by itself",
            ));
        }
        if copy == Some(true) {
            return Err(PyBufferError::new_err("no copy is made here: take the array and copy it"));
        }
        dlpack::capsule(py, self)
    }

    fn __dlpack_device__(&self) -> (c_int, c_int) {
        DEVICE
    }
}

/// The number of host memory in DLPack.
const DEVICE: (c_int, c_int) = (1, 0);

/// Makes the tensors of a library, through DLPack's exchange table in C (DLPack 1.2).
///
/// It is several times as fast as a capsule that goes through Python.
#[pyclass(frozen, module = "forebay._core")]
pub(crate) struct Tensors {
    make: dlpack::Make,
}

#[pymethods]
impl Tensors {
    /// Reads the `__dlpack_c_exchange_api__` of a tensor class.
    ///
    /// Returns None if the version of the table is unknown.
    #[staticmethod]
    fn by(api: &Bound<'_, PyCapsule>) -> PyResult<Option<Self>> {
        Ok(dlpack::make_of(api)?.map(|make| Self { make }))
    }
}

impl Tensors {
    pub(crate) fn of<'py>(
        &self,
        py: Python<'py>,
        batch: &Arc<forebay::Batch>,
        fields: &[Field],
    ) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        for field in fields {
            let name = match field.name {
                "input_ids" => pyo3::intern!(py, "input_ids").clone(),
                "labels" => pyo3::intern!(py, "labels").clone(),
                "x" => pyo3::intern!(py, "x").clone(),
                "y" => pyo3::intern!(py, "y").clone(),
                other => PyString::new(py, other),
            };
            dict.set_item(name, dlpack::tensor(py, batch, field, self.make)?)?;
        }
        Ok(dict)
    }
}

/// Adds the values that no array holds to `dict`, for the rows of consumer `part`.
pub(crate) fn add_facts(
    dict: &Bound<'_, PyDict>,
    batch: &forebay::Batch,
    part: usize,
    max_seqlen: Option<u64>,
) -> PyResult<()> {
    let py = dict.py();
    if let Some(longest) = max_seqlen {
        dict.set_item(pyo3::intern!(py, "max_seqlen"), longest)?;
    }
    for (name, texts) in batch.documents.iter().flat_map(|documents| documents.texts(part)) {
        dict.set_item(*name, PyList::new(py, texts.iter().map(Option::as_deref))?)?;
    }
    Ok(())
}

/// DLPack's C structures, their capsule, and their exchange table.
mod dlpack {
    use forebay::loader::Field;

    use super::*;

    const NAME: &CStr = c"dltensor";
    const EXCHANGE: &CStr = c"dlpack_exchange_api";

    #[repr(C)]
    struct Device {
        kind: c_int,
        id: c_int,
    }

    #[repr(C)]
    struct DataType {
        code: u8,
        bits: u8,
        lanes: u16,
    }

    #[repr(C)]
    struct Tensor {
        data: *mut c_void,
        device: Device,
        ndim: c_int,
        dtype: DataType,
        shape: *mut i64,
        strides: *mut i64,
        byte_offset: u64,
    }

    impl Tensor {
        /// Describes `field`. The caller sets the pointers to its shape and strides.
        fn new(batch: &forebay::Batch, field: &Field) -> Self {
            let code = match field.dtype.kind() {
                DtypeKind::Signed => 0,
                DtypeKind::Unsigned => 1,
                DtypeKind::Float => 2,
                DtypeKind::Bool => 6,
            };
            Self {
                data: field_start(batch, field).cast(),
                device: Device { kind: DEVICE.0, id: DEVICE.1 },
                ndim: field.ndim as c_int,
                dtype: DataType { code, bits: (field.dtype.size() * 8) as u8, lanes: 1 },
                shape: ptr::null_mut(),
                strides: ptr::null_mut(),
                byte_offset: 0,
            }
        }
    }

    /// The values that a tensor's pointers point to.
    struct Reached {
        shape: [i64; 4],
        strides: [i64; 4],
        _batch: Arc<forebay::Batch>,
    }

    impl Reached {
        fn new(batch: &Arc<forebay::Batch>, field: &Field) -> Self {
            Self {
                shape: field.shape.map(|count| count as i64),
                strides: strides(field).map(|stride| stride as i64),
                _batch: Arc::clone(batch),
            }
        }
    }

    #[repr(C)]
    struct ManagedTensor {
        tensor: Tensor,
        context: *mut c_void,
        deleter: Option<unsafe extern "C" fn(*mut ManagedTensor)>,
    }

    /// A tensor and the values that its pointers point to.
    struct Export {
        managed: ManagedTensor,
        reached: Reached,
    }

    pub(super) fn capsule<'py>(py: Python<'py>, array: &Array) -> PyResult<Bound<'py, PyAny>> {
        let tensor = Tensor::new(&array.batch, &array.field);
        let export = Box::into_raw(Box::new(Export {
            managed: ManagedTensor { tensor, context: ptr::null_mut(), deleter: Some(release) },
            reached: Reached::new(&array.batch, &array.field),
        }));
        // SAFETY: nothing else knows `export` yet. Its pointers point to its own fields. These stay
        // in place until `release` frees them.
        unsafe {
            (*export).managed.tensor.shape = (&raw mut (*export).reached.shape).cast();
            (*export).managed.tensor.strides = (&raw mut (*export).reached.strides).cast();
            (*export).managed.context = export.cast();
            let made = ffi::PyCapsule_New((&raw mut (*export).managed).cast(), NAME.as_ptr(), Some(forget_unused));
            if made.is_null() {
                drop(Box::from_raw(export));
            }
            Bound::from_owned_ptr_or_err(py, made)
        }
    }

    /// Frees a tensor. The consumer calls it once, on any thread, attached to the interpreter or
    /// not.
    unsafe extern "C" fn release(managed: *mut ManagedTensor) {
        // SAFETY: `context` is the box that `capsule` made, and the consumer calls this once
        // (DLPack).
        drop(unsafe { Box::from_raw((*managed).context.cast::<Export>()) });
    }

    /// Destroys a capsule. A consumer that takes over the tensor renames the capsule.
    unsafe extern "C" fn forget_unused(capsule: *mut ffi::PyObject) {
        // SAFETY: the interpreter calls this, attached, with the capsule made above. Its pointer is
        // valid while it has our name.
        unsafe {
            if ffi::PyCapsule_IsValid(capsule, NAME.as_ptr().cast::<c_char>()) == 1 {
                let managed = ffi::PyCapsule_GetPointer(capsule, NAME.as_ptr().cast::<c_char>());
                release(managed.cast());
            }
        }
    }

    #[derive(Clone, Copy)]
    #[repr(C)]
    struct Version {
        major: u32,
        minor: u32,
    }

    /// The tensor that the exchange table takes, in version 1.
    #[repr(C)]
    pub(super) struct VersionedTensor {
        version: Version,
        context: *mut c_void,
        deleter: Option<unsafe extern "C" fn(*mut VersionedTensor)>,
        flags: u64,
        tensor: Tensor,
    }

    /// Makes a Python object from a tensor and takes it over. Returns 0, or -1 with an exception
    /// set.
    pub(super) type Make = unsafe extern "C" fn(*mut VersionedTensor, *mut *mut c_void) -> c_int;

    /// The part of the exchange table that is used here.
    #[repr(C)]
    struct Exchange {
        version: Version,
        previous: *const Exchange,
        allocate: *const c_void,
        from_python: *const c_void,
        to_python: Option<Make>,
    }

    pub(super) fn make_of(api: &Bound<'_, PyCapsule>) -> PyResult<Option<Make>> {
        // SAFETY: the interpreter checks that the capsule has this name. By that name, DLPack
        // promises this table, which lives as long as the library.
        let table = unsafe { ffi::PyCapsule_GetPointer(api.as_ptr(), EXCHANGE.as_ptr()) }.cast::<Exchange>();
        if table.is_null() {
            return Err(PyErr::fetch(api.py()));
        }
        // SAFETY: see above. In every version, the version and the previous table are the first
        // fields.
        unsafe {
            let mut table = table.cast_const();
            while !table.is_null() && (*table).version.major != 1 {
                table = (*table).previous;
            }
            Ok(table.as_ref().and_then(|table| table.to_python))
        }
    }

    struct VersionedExport {
        managed: VersionedTensor,
        reached: Reached,
    }

    /// Makes a tensor of `field` of `batch` with `make`.
    pub(super) fn tensor<'py>(
        py: Python<'py>,
        batch: &Arc<forebay::Batch>,
        field: &Field,
        make: Make,
    ) -> PyResult<Bound<'py, PyAny>> {
        let managed = VersionedTensor {
            version: Version { major: 1, minor: 0 },
            context: ptr::null_mut(),
            deleter: Some(release_versioned),
            flags: 0,
            tensor: Tensor::new(batch, field),
        };
        let export = Box::into_raw(Box::new(VersionedExport { managed, reached: Reached::new(batch, field) }));
        let mut made = ptr::null_mut();
        // SAFETY: nothing else knows `export` yet. Its pointers point to its own fields. These stay
        // in place until `release_versioned` frees them. The interpreter is attached, as `make`
        // demands.
        unsafe {
            (*export).managed.tensor.shape = (&raw mut (*export).reached.shape).cast();
            (*export).managed.tensor.strides = (&raw mut (*export).reached.strides).cast();
            (*export).managed.context = export.cast();
            if make((&raw mut (*export).managed).cast(), &raw mut made) != 0 {
                // It is unknown whether the tensor was taken over before the failure. A leak is
                // better than a second free.
                return Err(PyErr::fetch(py));
            }
            Bound::from_owned_ptr_or_err(py, made.cast())
        }
    }

    /// Frees a tensor. The consumer calls it once, on any thread, attached to the interpreter or
    /// not.
    unsafe extern "C" fn release_versioned(managed: *mut VersionedTensor) {
        // SAFETY: `context` is the box that `tensor` made, and the consumer calls this once
        // (DLPack).
        drop(unsafe { Box::from_raw((*managed).context.cast::<VersionedExport>()) });
    }
}
