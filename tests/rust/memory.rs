//! Tests that a batch belongs to its holder.
//!
//! Nothing is written to a buffer after it was handed over, and nothing after it was given back.

use std::alloc::{Layout, alloc, dealloc};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use forebay::buffer::{ALIGNMENT, BufferSource};
use forebay::settings::{Config, Shuffle};
use forebay::tokens::Dtype;
use forebay::{Loader, Next};
use forebay_tests::{Container, Shape, documents, rows, write};

const POISON: u8 = 0xA5;

/// Gives out each buffer once, poisons what comes back, and looks at the end whether the poison is
/// still there.
#[derive(Debug, Default)]
struct Poisoning {
    given: AtomicUsize,
    returned: Mutex<Vec<(usize, usize)>>,
}

// SAFETY: `take` gives fresh memory of this alignment and size, written over, that is freed only
// after it came back.
unsafe impl BufferSource for Poisoning {
    fn take(&self, bytes: usize) -> NonNull<u8> {
        self.given.fetch_add(1, Ordering::Relaxed);
        let layout = Layout::from_size_align(bytes, ALIGNMENT).unwrap();
        // SAFETY: the size is not zero; the bytes are written before anyone reads them.
        unsafe {
            let start = alloc(layout);
            start.write_bytes(0x11, bytes);
            NonNull::new(start).unwrap()
        }
    }

    unsafe fn give_back(&self, buffer: NonNull<u8>, bytes: usize) {
        // SAFETY: given out by `take` with this length, and no longer used by the caller.
        unsafe { buffer.as_ptr().write_bytes(POISON, bytes) };
        self.returned.lock().unwrap().push((buffer.as_ptr() as usize, bytes));
    }

    fn held_bytes(&self) -> usize {
        0
    }
}

impl Poisoning {
    fn check_and_free(&self) -> usize {
        let returned = std::mem::take(&mut *self.returned.lock().unwrap());
        for (start, bytes) in &returned {
            let start = *start as *mut u8;
            // SAFETY: returned buffers are this source's alone, and are freed once, here.
            unsafe {
                let bytes_now = std::slice::from_raw_parts(start, *bytes);
                assert!(bytes_now.iter().all(|byte| *byte == POISON), "a buffer was written after it was given back");
                dealloc(start, Layout::from_size_align(*bytes, ALIGNMENT).unwrap());
            }
        }
        returned.len()
    }
}

#[test]
fn buffers_are_written_only_between_lease_and_hand_over() {
    let folder = tempfile::tempdir().unwrap();
    write(
        &folder.path().join("a.arrow"),
        Container::ArrowFile(None),
        Dtype::U16,
        Shape::List,
        &documents(2000, 100, 1 << 16, 1),
        50,
    );
    let source = Arc::new(Poisoning::default());
    let loader = Loader::open_with(
        Config {
            data: vec![folder.path().to_str().unwrap().to_owned()],
            seq_len: 64,
            batch_size: 4,
            shuffle: Shuffle::On,
            num_threads: Some(4),
            prefetch_batches: 6,
            ..Config::default()
        },
        |_, _| Arc::clone(&source) as Arc<dyn BufferSource>,
    )
    .unwrap();
    let mut held = Vec::new();
    for _ in 0..3 {
        let pass = loader.iter();
        let mut taken = 0;
        while let Next::Batch(batch) = pass.next_timeout(Duration::from_secs(60)).unwrap() {
            let content = rows(&[Arc::clone(&batch)], "input_ids");
            assert!(content.iter().flatten().all(|id| (0..1 << 16).contains(id)));
            // Every third batch is kept for long, the others are dropped at once.
            taken += 1;
            if taken % 3 == 0 {
                held.push((batch, content));
            }
        }
        assert_eq!(taken, loader.len());
    }
    for (batch, content) in &held {
        assert_eq!(&rows(&[Arc::clone(batch)], "input_ids"), content, "a batch changed while it was held");
    }
    loader.close();
    drop((held, loader));
    assert_eq!(source.check_and_free(), source.given.load(Ordering::Relaxed), "every buffer came back");
}

#[test]
fn submitted_buffers_are_filled_in_their_order_and_let_go_with_their_batch() {
    let folder = tempfile::tempdir().unwrap();
    write(
        &folder.path().join("a.arrow"),
        Container::ArrowFile(None),
        Dtype::I32,
        Shape::List,
        &documents(500, 100, 1 << 30, 1),
        50,
    );
    let loader = Loader::open(Config {
        data: vec![folder.path().to_str().unwrap().to_owned()],
        seq_len: 64,
        batch_size: 4,
        num_threads: Some(3),
        ..Config::default()
    })
    .unwrap();
    let expected = rows(&forebay_tests::drain(&loader.iter()), "input_ids");
    loader.set_epoch(0);
    let pass = loader.iter_external();
    let alive = Arc::new(());
    let mut starts = Vec::new();
    let mut submit = || {
        let mut memory = vec![0i64; pass.batch_bytes() / 8];
        let start = NonNull::new(memory.as_mut_ptr().cast::<u8>()).unwrap();
        starts.push(start.as_ptr() as usize);
        // SAFETY: the vector's heap memory stays where it is while the boxed owner lives, and no
        // one else uses it.
        unsafe { pass.submit(start, memory.len() * 8, Box::new((memory, Arc::clone(&alive)))) }.unwrap();
    };
    (0..pass.buffers_wanted()).for_each(|_| submit());
    let mut got = Vec::new();
    for index in 0.. {
        match pass.next_timeout(Duration::from_secs(60)).unwrap() {
            Next::Batch(batch) => {
                submit();
                got.push((index, batch.as_ptr() as usize, rows(&[batch], "input_ids")));
            }
            Next::End => break,
            Next::Pending => panic!("no batch within a minute"),
        }
    }
    assert!(got.iter().all(|(index, start, _)| starts[*index] == *start));
    assert_eq!(got.into_iter().flat_map(|(_, _, rows)| rows).collect::<Vec<_>>(), expected);
    loader.close();
    drop(pass);
    assert_eq!(Arc::strong_count(&alive), 1, "every buffer was let go");
}
