//! Tests that a delivery log is read as it was written, and that every fault in it is named.
// A `vec![8..12]` here is one hole.
#![allow(clippy::single_range_in_vec_init)]

use proptest::prelude::*;

use super::*;
use crate::order::epochs::EpochChain;

const CONTENT: &str = "content";

/// The batch of one rank, with the rows that the rule for all ranks gives it.
fn logged(position: u64, rank: u64, world_size: u64, batch_size: u64) -> LoggedBatch {
    let mut checksum = Checksum::default();
    for row in 0..batch_size {
        let sequence = position + row * world_size + rank;
        checksum.add_row(0, sequence, &[sequence as i64; 3]);
    }
    LoggedBatch {
        start: (0, position),
        end: (0, position + world_size * batch_size),
        checksum,
        substituted: Vec::new(),
    }
}

fn pass(rank: u64, world_size: u64, batch_size: u64, position: u64) -> LoggedPass {
    LoggedPass {
        run: String::new(),
        time_ms: 0,
        launch: None,
        epoch: 0,
        position,
        rank,
        world_size,
        batch_size,
        content: CONTENT.to_owned(),
        settings: vec![("seed".to_owned(), "7".to_owned())],
        fingerprint: "fingerprint".to_owned(),
        growth: "0:1".to_owned(),
    }
}

/// Writes the log of a launch that delivers `positions` and is then killed.
fn launch(folder: &Path, world_size: u64, batch_size: u64, positions: Range<u64>) {
    for rank in 0..world_size {
        let mut writer = LogWriter::begin(folder, pass(rank, world_size, batch_size, positions.start)).unwrap();
        for start in positions.clone().step_by((world_size * batch_size) as usize) {
            writer.write(&logged(start, rank, world_size, batch_size)).unwrap();
        }
    }
    // Launches must differ in their time.
    std::thread::sleep(std::time::Duration::from_millis(2));
}

fn tile(folder: &Path, positions: u64, may_drop: bool) -> Tiling {
    let delivery_log = DeliveryLog::read(folder).unwrap();
    let chain = EpochChain::new(0, Some(1), &[], [], |_| positions);
    delivery_log.tile(CONTENT, &ProofRange { epochs: 0..1, chain: &chain, from: 0, may_drop })
}

fn all(positions: u64) -> Checksum {
    logged(0, 0, 1, positions).checksum
}

fn append(path: &Path, text: &str) {
    File::options().append(true).open(path).unwrap().write_all(text.as_bytes()).unwrap();
}

#[test]
fn launches_of_changing_world_size_make_one_chain() {
    let folder = tempfile::tempdir().unwrap();
    launch(folder.path(), 4, 3, 0..60);
    launch(folder.path(), 2, 6, 36..96);
    launch(folder.path(), 1, 12, 72..84);
    launch(folder.path(), 2, 4, 84..116);
    let tiling = tile(folder.path(), 120, true);
    assert_eq!(tiling.checksum(), all(116));
    assert_eq!((tiling.holes.len(), tiling.dropped.clone()), (0, 116..120), "{tiling:?}");
    let sizes: Vec<_> = tiling.chain.iter().map(|batch| (batch.position, batch.world_size)).collect();
    let expected: Vec<_> = [(0, 4), (12, 4), (24, 4), (36, 2), (48, 2), (60, 2), (72, 1), (84, 2), (92, 2)].into();
    assert_eq!(sizes[..9], expected, "the later launch counts");
    // The log has two steps of four ranks and two steps of two ranks twice.
    assert_eq!((tiling.spare, tiling.conflicts.len(), tiling.doubles.len()), (2 * 4 + 2 * 2, 0, 0));
    assert_eq!(tile(folder.path(), 120, false).holes, [116..120]);
}

#[test]
fn a_batch_that_two_launches_had_must_be_the_same() {
    let folder = tempfile::tempdir().unwrap();
    launch(folder.path(), 2, 2, 0..12);
    launch(folder.path(), 2, 2, 4..16);
    let tiling = tile(folder.path(), 16, false);
    assert_eq!((tiling.checksum(), tiling.spare, tiling.conflicts.len()), (all(16), 4, 0));
    assert_eq!(tiling.doubles, []);

    let mut writer = LogWriter::begin(folder.path(), pass(1, 2, 2, 8)).unwrap();
    writer.write(&LoggedBatch { checksum: all(2), ..logged(8, 1, 2, 2) }).unwrap();
    let tiling = tile(folder.path(), 16, false);
    let [conflict] = tiling.conflicts.as_slice() else { panic!("{:?}", tiling.conflicts) };
    assert_eq!((conflict.position, conflict.rank, conflict.world_size), (8, Some(1), 2));
}

#[test]
fn a_global_batch_must_be_the_same_on_any_number_of_ranks() {
    let folder = tempfile::tempdir().unwrap();
    launch(folder.path(), 2, 2, 0..8);
    let mut writer = LogWriter::begin(folder.path(), pass(0, 1, 4, 4)).unwrap();
    writer.write(&logged(4, 0, 1, 4)).unwrap();
    assert_eq!(tile(folder.path(), 8, false).conflicts, []);
    let mut writer = LogWriter::begin(folder.path(), pass(0, 4, 1, 4)).unwrap();
    writer.write(&LoggedBatch { checksum: all(1), ..logged(4, 0, 4, 1) }).unwrap();
    for rank in 1..4 {
        let mut writer = LogWriter::begin(folder.path(), pass(rank, 4, 1, 4)).unwrap();
        writer.write(&logged(4, rank, 4, 1)).unwrap();
    }
    let tiling = tile(folder.path(), 8, false);
    let [conflict] = tiling.conflicts.as_slice() else { panic!("{:?}", tiling.conflicts) };
    assert_eq!((conflict.position, conflict.rank), (4, None));
}

#[test]
fn two_processes_of_one_rank_are_told_from_two_launches() {
    let folder = tempfile::tempdir().unwrap();
    let mut writers = [(); 2].map(|()| LogWriter::begin(folder.path(), pass(0, 1, 2, 0)).unwrap());
    for start in [0, 2, 4] {
        writers.iter_mut().for_each(|writer| writer.write(&logged(start, 0, 1, 2)).unwrap());
    }
    let tiling = tile(folder.path(), 6, false);
    assert_eq!(tiling.doubles.iter().map(|double| double.position).collect::<Vec<_>>(), [0, 2, 4]);
    assert_eq!(tiling.checksum(), all(6));
}

#[test]
fn what_is_missing_is_a_hole() {
    let folder = tempfile::tempdir().unwrap();
    launch(folder.path(), 2, 2, 0..8);
    launch(folder.path(), 2, 2, 12..20);
    // Rank 1 never received the batch at 20.
    let mut writer = LogWriter::begin(folder.path(), pass(0, 2, 2, 20)).unwrap();
    writer.write(&logged(20, 0, 2, 2)).unwrap();
    let tiling = tile(folder.path(), 25, true);
    assert_eq!((tiling.holes.clone(), tiling.partial), (vec![8..12, 20..25], 1));
    assert_eq!(tiling.missing(25), (&[8..12][..], 20..25), "what is still to come is no hole");
    launch(folder.path(), 1, 4, 8..12);
    let tiling = tile(folder.path(), 25, true);
    assert_eq!((tiling.holes.as_slice(), tiling.checksum()), (&[20..25][..], all(20)));
    assert_eq!(tiling.missing(25), (&[][..], 20..25));
    launch(folder.path(), 1, 5, 20..25);
    assert_eq!(tile(folder.path(), 25, true).missing(25), (&[][..], 25..25));
}

#[test]
fn positions_after_the_last_batch_are_told_from_holes() {
    for (launches, holes, to_come) in [
        (&[0..8][..], vec![], 8..40),
        (&[4..8], vec![0..4], 8..40),
        (&[0..4, 8..12, 20..24], vec![4..8, 12..20], 24..40),
        (&[0..4, 36..40], vec![4..36], 40..40),
        (&[8..40], vec![0..8], 40..40),
    ] {
        let folder = tempfile::tempdir().unwrap();
        launches.iter().for_each(|positions| launch(folder.path(), 2, 2, positions.clone()));
        let tiling = tile(folder.path(), 40, false);
        assert_eq!(tiling.missing(40), (holes.as_slice(), to_come), "{launches:?}");
    }
}

#[test]
fn a_torn_line_is_passed_over_only_where_a_kill_leaves_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rank-00000.jsonl");
    launch(folder.path(), 1, 4, 0..8);
    append(&path, "{\"run\":\"01");
    let delivery_log = DeliveryLog::read(folder.path()).unwrap();
    assert_eq!((delivery_log.torn().len(), delivery_log.batches(CONTENT).count()), (1, 2));
    // The next launch begins a line of its own.
    launch(folder.path(), 1, 4, 8..16);
    let delivery_log = DeliveryLog::read(folder.path()).unwrap();
    assert_eq!((delivery_log.torn().len(), delivery_log.passes().len()), (1, 2));
    let first = LoggedPass { run: String::new(), time_ms: 0, ..delivery_log.passes()[0].clone() };
    assert_eq!(first, pass(0, 1, 4, 0));
    assert_eq!(tile(folder.path(), 16, false).checksum(), all(16));

    let sound = std::fs::read_to_string(&path).unwrap();
    let lines: Vec<_> = sound.lines().collect();
    for (damaged, message) in [
        (lines[1].replace("\"hash\"", "\"hash"), "line 2: it is torn and others of the same launch follow"),
        (lines[1].replace("\"rows\":4", "\"rows\":-4"), "line 2: `rows` is missing or no number"),
        (lines[1].replace("\"run\":\"", "\"run\":\"x"), "has no `delivery_log` line"),
        (lines[1].replace("\"hash\":\"", "\"hash\":\"x"), "`hash` is not hexadecimal"),
        (lines[1].replace("\"end\":4", "\"end\":0"), "the batch ends where it starts"),
    ] {
        std::fs::write(&path, sound.replace(lines[1], &damaged)).unwrap();
        let error = DeliveryLog::read(folder.path()).unwrap_err();
        assert!(error.to_string().contains(message), "{error}");
        assert_eq!(error.location().unwrap().path, path);
    }
    std::fs::write(&path, sound.replace("\"delivery_log\":1", "\"delivery_log\":2")).unwrap();
    assert!(DeliveryLog::read(folder.path()).unwrap_err().to_string().contains("it has version 2"));
    std::fs::remove_file(&path).unwrap();
    assert_eq!(DeliveryLog::read(folder.path()).unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn a_line_that_cannot_be_written_fails_now_and_later() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = LogWriter::begin(folder.path(), pass(0, 1, 4, 0)).unwrap();
    // Simulates a full disk.
    writer.file = File::open(folder.path().join("rank-00000.jsonl")).unwrap();
    for _ in 0..2 {
        let error = writer.write(&logged(4, 0, 1, 4)).unwrap_err();
        assert!(error.to_string().contains("cannot write the delivery log at position 4 of epoch 0"), "{error}");
    }
    assert!(writer.check().is_err());
}

#[test]
fn epochs_that_a_batch_crosses_are_proved_together() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = LogWriter::begin(folder.path(), pass(0, 1, 4, 0)).unwrap();
    // Epochs of 6, 6 and 4 positions.
    for (start, end) in [((0, 0), (0, 4)), ((0, 4), (1, 2)), ((1, 2), (1, 6)), ((2, 0), (2, 4))] {
        writer.write(&LoggedBatch { start, end, checksum: all(4), substituted: Vec::new() }).unwrap();
    }
    let delivery_log = DeliveryLog::read(folder.path()).unwrap();
    assert_eq!(delivery_log.epochs(CONTENT), [0..2, 2..3]);
    assert_eq!(delivery_log.epochs("other"), []);
    let chain = EpochChain::new(0, Some(2), &[], [], |_| 6);
    let range = ProofRange { epochs: 0..2, chain: &chain, from: 0, may_drop: false };
    let tiling = delivery_log.tile(CONTENT, &range);
    assert_eq!((tiling.chain.len(), tiling.holes.len(), range.len()), (3, 0, 12));
    assert_eq!((chain.at(7), range.index((1, 1)), chain.state_at(12)), ((1, 1), 7, (1, 6)));
}

proptest! {
    #[test]
    fn launches_that_overlap_and_resume_anywhere_are_proved(
        positions in 1u64..200, launches in prop::collection::vec((1u64..4, 1u64..5, 0u64..8, 0u64..5), 0..6),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let (mut checkpoint, mut reached) = (0, 0);
        for (world_size, batch_size, steps, back) in launches {
            let size = world_size * batch_size;
            let end = (checkpoint + steps * size).min(positions - (positions - checkpoint) % size);
            launch(folder.path(), world_size, batch_size, checkpoint..end);
            reached = reached.max(end);
            checkpoint = end.saturating_sub(back * size).max(checkpoint);
        }
        launch(folder.path(), 1, 1, checkpoint..positions);
        let tiling = tile(folder.path(), positions, false);
        prop_assert_eq!(tiling.checksum(), all(positions));
        prop_assert!(tiling.holes.is_empty() && tiling.conflicts.is_empty() && tiling.doubles.is_empty());
        let last = tiling.chain.last().unwrap();
        prop_assert!(checkpoint == positions || (last.world_size, last.batch_size) == (1, 1));
    }
}
