//! The shards of one source in order, with the facts about each and a fingerprint of all.
//!
//! Without a saved index, all shards are opened at the start, in parallel on a pool of the loader.
//! Every fault is reported, not only the first.
//!
//! With a saved index, only shards that are new or changed are opened at the start. Every other
//! shard is opened by the first thread that reads it, and must be as the index says.

pub mod checksums;
pub mod discover;
pub mod index;
pub mod lengths;
pub mod parts;
pub mod schema;
mod shard_cache;
pub mod tables;

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use xxhash_rust::xxh3::Xxh3;

use self::checksums::{ChecksumsFile, ColumnChecksums, SavedChecksums};
use self::discover::{Discovery, ShardFile};
use crate::corpus::index::{IndexFile, PathHash, SavedIndex};
use crate::corpus::lengths::LengthsFile;
use crate::corpus::schema::Schema;
use crate::corpus::shard_cache::{Held, ShardCache};
use crate::corpus::tables::TableFile;
use crate::error::{Error, ErrorKind, Result};
use crate::format::documents::DocumentColumn;
use crate::format::{self, Access, Counts, DecodedBlock, Ends, Format, MissingColumn, OpenOptions, Shard, ShardFacts};
use crate::settings::{DataFormat, Io};
use crate::storage::{self, Files, Stamp, local};
use crate::sync::lock;
use crate::text::escaped;
use crate::tokens::{Dtype, FieldType, FieldTypes, MAX_FIELDS};

/// A block of the corpus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockRef {
    /// Index of the shard.
    pub shard: u32,
    /// Index of the block in its shard.
    pub block: u32,
}

/// An opened shard, with the counts before each of its blocks.
#[derive(Debug)]
pub struct OpenShard {
    shard: Shard,
    /// The stamp of the file, and of the files beside it.
    stamp: Stamp,
    before: Vec<Counts>,
    /// The further columns of the file, in the order of the setting `fields`. `None` stands for a
    /// column that the file lacks.
    fields: Vec<Option<OpenShard>>,
    /// The further columns with one value for each document. `None` stands for any other column.
    documents: Vec<Option<DocumentColumn>>,
    /// The rows without tokens, once a thread has asked for them.
    empty_rows: OnceLock<Vec<u64>>,
    /// Bytes of all blocks of the further columns when decoded.
    fields_bytes: u64,
    /// The column with the starts of documents inside rows, if it is asked for.
    borders: Option<Box<OpenShard>>,
    /// The saved checksums of this column. `None` if there are none.
    checksums: Option<ColumnChecksums>,
    /// The saved checksums of the further columns with one value for each document.
    document_checksums: Vec<Option<ColumnChecksums>>,
}

impl OpenShard {
    /// Opens the token column of the file at `path`, and the further columns that `options` name.
    fn open(path: &Path, options: &OpenOptions) -> Result<Self> {
        let mut opened = Self::new(format::open(path, options)?);
        opened.stamp = format::stamp_with_beside(&options.files, path, opened.stamp)?;
        // A shard without tokens has no values of any column.
        let may_be_missing = options.fields_may_be_missing || opened.shard.blocks().is_empty();
        for name in &options.fields {
            // Rows that are tokens belong to one document, and have no values of documents.
            let has_documents = !opened.shard.info().column.is_plain();
            let is_per_token = |field: &Shard| field.info().column.is_plain() != has_documents;
            let (field, column) = match format::open(path, &options.of_field(name)) {
                Ok(field) if is_per_token(&field) => (Some(Self::new(field)), None),
                Err(error) if may_be_missing && is_missing_column(&error) => (None, None),
                Err(error) if !has_documents || is_missing_column(&error) => return Err(error),
                found => match DocumentColumn::open(path, name, options)? {
                    Some(column) => (None, Some(column)),
                    None => (Some(Self::new(found?)), None),
                },
            };
            if let Some(field) = &field {
                opened.check_fits(field, name)?;
            }
            if let Some(column) = &column {
                opened.check_rows(column)?;
            }
            opened.fields.push(field);
            opened.documents.push(column);
        }
        if let Some(name) = options.borders.as_deref().filter(|_| !opened.shard.blocks().is_empty()) {
            let missing = || Error::data(format!("column `{name}` of `packed_by` is missing")).at(path);
            let borders = format::open(path, &options.of_field(name));
            let borders = borders.map_err(|error| if is_missing_column(&error) { missing() } else { error })?;
            opened.borders = Some(Box::new(Self::new(borders)));
        }
        let bytes = |field: &Self| field.shard.blocks().iter().map(|block| block.decoded_bytes).sum::<u64>();
        opened.fields_bytes = opened.fields.iter().flatten().map(bytes).sum();
        Ok(opened)
    }

    /// Fails unless the column `field`, called `name`, has as many documents and values as the
    /// tokens.
    fn check_fits(&self, field: &Self, name: &str) -> Result<()> {
        let [tokens, values] = [self, field].map(|column| column.before[column.before.len() - 1]);
        let [there, now] = [self, field].map(|column| &column.shard.info().file);
        // A column may lie in a file of its own.
        if there.path() == now.path() && there.stamp() != now.stamp() {
            return Err(Error::new(ErrorKind::Changed, "shard changed while it was opened").at(self.shard.path()));
        }
        if (tokens.tokens, tokens.starts) == (values.tokens, values.starts) {
            Ok(())
        } else {
            Err(self.misfit(field, name))
        }
    }

    /// Fails unless the per-document column has as many rows as the file.
    fn check_rows(&self, column: &DocumentColumn) -> Result<()> {
        let (there, now) = (&self.shard.info().file, column.file());
        if there.stamp() != now.stamp() {
            return Err(Error::new(ErrorKind::Changed, "shard changed while it was opened").at(self.shard.path()));
        }
        let (rows, found) = (self.shard.info().rows, column.rows());
        if rows == found {
            return Ok(());
        }
        let name = escaped(column.name());
        let text = format!("column `{name}` must have a value for each of {rows} rows, found {found}");
        Err(Error::data(text).at(self.shard.path()))
    }

    /// Returns the further column `column` - 1, if it has one value for each document.
    pub(crate) fn document_column(&self, field: usize) -> Option<&DocumentColumn> {
        self.documents.get(field)?.as_ref()
    }

    /// The row of the file with document `number` among its non-empty documents.
    ///
    /// If the file has rows without tokens, the first call reads the lengths of all rows.
    pub(crate) fn row_of_document(&self, number: u64) -> Result<u64> {
        if self.shard.info().rows == self.before[self.before.len() - 1].starts {
            return Ok(number);
        }
        let empty = match self.empty_rows.get() {
            Some(empty) => empty,
            None => {
                let lengths = self.shard.row_lengths()?;
                let is_empty = |(row, length): (u64, Option<u64>)| (length.unwrap_or(0) == 0).then_some(row);
                let found = (0..).zip(lengths).filter_map(is_empty).collect();
                self.empty_rows.get_or_init(|| found)
            }
        };
        // Row `empty[i]` comes after `empty[i] - i` documents.
        let (mut low, mut high) = (0, empty.len());
        while low < high {
            let middle = low.midpoint(high);
            if empty[middle] - middle as u64 <= number { low = middle + 1 } else { high = middle }
        }
        Ok(number + low as u64)
    }

    /// Makes the error for the column `name` whose documents differ in length from the token
    /// documents.
    ///
    /// Reads both columns to find the first such row.
    pub(crate) fn misfit(&self, field: &Self, name: &str) -> Error {
        let error = |text: String| Error::data(text).at(self.shard.path());
        let lengths = self.shard.row_lengths().and_then(|tokens| Ok((tokens, field.shard.row_lengths()?)));
        let (tokens, values) = match lengths {
            Ok(lengths) => lengths,
            Err(cause) => return cause.at(self.shard.path()),
        };
        let length = |lengths: &[Option<u64>], row: usize| lengths.get(row).copied().flatten().unwrap_or(0);
        match (0..tokens.len().max(values.len())).find(|row| length(&tokens, *row) != length(&values, *row)) {
            Some(row) => error(format!(
                "column `{name}` must have a value for each token: expected {}, found {}",
                length(&tokens, row),
                length(&values, row)
            ))
            .at_row(row as u64),
            None => error(format!("column `{name}` has other documents than the tokens when it is read again")),
        }
    }

    /// The row of the file with token `token` of the shard. Reads the lengths of all rows.
    pub(crate) fn row_of(&self, token: u64) -> Option<u64> {
        let mut before = 0;
        let row = self.shard.row_lengths().ok()?.iter().position(|length| {
            before += length.unwrap_or(0);
            before > token
        });
        row.map(|row| row as u64)
    }

    /// Returns column `column` of the file. Column 0 holds the tokens, and the fields follow in
    /// order. Returns `None` if the file lacks the column.
    pub(crate) fn column(&self, column: usize) -> Option<&Self> {
        match column.checked_sub(1) {
            None => Some(self),
            Some(field) => self.fields.get(field)?.as_ref(),
        }
    }

    /// Average bytes that `tokens` tokens take in the further columns when decoded.
    pub(crate) fn fields_bytes_of(&self, tokens: u64) -> u64 {
        let all = self.before[self.before.len() - 1].tokens.max(1);
        (u128::from(self.fields_bytes) * u128::from(tokens) / u128::from(all)) as u64
    }

    /// The column with the starts of documents inside rows. `None` if it is not asked for, or if
    /// the file has no token.
    pub(crate) fn borders(&self) -> Option<&Self> {
        self.borders.as_deref()
    }

    /// The columns that the file has.
    fn columns(&self) -> impl Iterator<Item = &Self> {
        std::iter::once(self).chain(self.fields.iter().flatten()).chain(self.borders())
    }

    /// Facts about the file that need none of its blocks. Sizes count all columns.
    pub fn facts(&self) -> ShardFacts {
        let mut facts = self.shard.facts();
        facts.stamp = self.stamp;
        for field in self.fields.iter().flatten() {
            let more = field.shard.facts();
            facts.decoded_bytes += more.decoded_bytes;
            facts.largest_block_bytes = facts.largest_block_bytes.max(more.largest_block_bytes);
        }
        let of_field = |(field, column): (&Option<Self>, &Option<DocumentColumn>)| match (field, column) {
            (Some(field), _) => Some(FieldType::PerToken(field.shard.info().dtype)),
            (None, Some(column)) => Some(FieldType::PerDocument(column.kind())),
            (None, None) => None,
        };
        facts.fields = FieldTypes::new(self.fields.iter().zip(&self.documents).map(of_field));
        facts
    }

    /// Takes the checksums of record `record`. They stand in the order of [`OpenShard::hashes`].
    fn take_checksums(&mut self, saved: &Arc<SavedChecksums>, record: usize) -> Result<()> {
        let mut offset = 0;
        let mut next = |before: Vec<u64>| {
            let count = before[before.len() - 1];
            let checksums = ColumnChecksums::new(saved, record, offset, before);
            offset += count;
            Some(checksums)
        };
        self.checksums = next(checksums::pieces(&self.shard));
        for column in self.fields.iter_mut().flatten().chain(self.borders.as_deref_mut()) {
            column.checksums = next(checksums::pieces(&column.shard));
        }
        let mut of_documents = |column: &Option<DocumentColumn>| next((0..=column.as_ref()?.parts() as u64).collect());
        self.document_checksums = self.documents.iter().map(&mut of_documents).collect();
        ColumnChecksums::check_count(saved, record, offset)
    }

    /// Computes the checksums of all columns.
    fn hashes(&self) -> Result<Vec<u64>> {
        let mut hashes = Vec::new();
        for column in self.columns() {
            hashes.extend(checksums::hash_column(&column.shard)?);
        }
        let mut decoded = DecodedBlock::default();
        for column in self.documents.iter().flatten() {
            for part in 0..column.parts() {
                column.decode_into(part, &mut decoded)?;
                hashes.push(checksums::hash_values(&decoded));
            }
        }
        Ok(hashes)
    }

    /// Whether damage of this column can be found.
    pub(crate) fn has_checksums(&self) -> bool {
        self.checksums.is_some()
    }

    /// Fails if `ends`, the ends of block `block`, are not as they were when checksums were saved.
    pub(crate) fn check_ends(&self, block: usize, ends: &Ends<'_>) -> Result<()> {
        self.checksums.as_ref().map_or(Ok(()), |checksums| checksums.check_ends(&self.shard, block, ends))
    }

    /// Fails if the tokens in `range` of block `block`, which is read in place, are not as they
    /// were when checksums were saved. Uses `bytes` as memory.
    pub(crate) fn check_tokens(&self, block: usize, range: &Range<u64>, bytes: &mut Vec<u8>) -> Result<()> {
        self.checksums.as_ref().map_or(Ok(()), |checksums| checksums.check_tokens(&self.shard, block, range, bytes))
    }

    /// Decodes block `block` whole into `out`. Fails if it is not as it was when checksums were
    /// saved.
    ///
    /// # Panics
    /// Panics if the shard is read in place.
    pub(crate) fn decode_block(&self, block: usize, out: &mut DecodedBlock) -> Result<()> {
        let Shard::Block(shard) = &self.shard else { panic!("windows of this shard are not decoded") };
        shard.decode_into(block, None, out)?;
        self.checksums.as_ref().map_or(Ok(()), |checksums| checksums.check_decoded(&self.shard, block, out))
    }

    /// Fails if `decoded`, part `part` of per-document column `field`, is not as it was when
    /// checksums were saved.
    pub(crate) fn check_values(&self, field: usize, part: usize, decoded: &DecodedBlock) -> Result<()> {
        let checksums = self.document_checksums.get(field).and_then(Option::as_ref);
        let checked = checksums.map_or(Ok(()), |checksums| checksums.check_values(part, decoded));
        checked.map_err(|error| error.at(self.shard.path()).in_block(part as u64))
    }

    /// Reads all columns and compares them with the saved checksums. Returns the faults, at most
    /// one for each block of a column.
    fn damage(&self) -> Vec<Error> {
        let (mut faults, mut decoded) = (Vec::new(), DecodedBlock::default());
        let (mut bytes, mut ends) = (Vec::new(), format::EndsScratch::default());
        for column in self.columns() {
            for (block, meta) in column.shard.blocks().iter().enumerate() {
                let compared = match &column.shard {
                    Shard::Random(shard) => shard
                        .ends(block, &mut ends)
                        .and_then(|ends| column.check_ends(block, &ends))
                        .and_then(|()| column.check_tokens(block, &(0..meta.tokens), &mut bytes)),
                    Shard::Block(_) => column.decode_block(block, &mut decoded),
                };
                faults.extend(compared.err().map(|error| error.at(self.shard.path()).in_block(block as u64)));
            }
        }
        for (field, column) in self.documents.iter().enumerate() {
            let Some(column) = column else { continue };
            for part in 0..column.parts() {
                let compared =
                    column.decode_into(part, &mut decoded).and_then(|()| self.check_values(field, part, &decoded));
                faults.extend(compared.err().map(|error| error.at(self.shard.path()).in_block(part as u64)));
            }
        }
        faults
    }

    /// Closes the file until its next use. That use fails if the file has changed meanwhile.
    fn let_go(&mut self) {
        self.shard.let_go();
        self.fields.iter_mut().flatten().chain(self.borders.as_deref_mut()).for_each(Self::let_go);
        self.documents.iter_mut().flatten().for_each(DocumentColumn::let_go);
    }

    fn new(shard: Shard) -> Self {
        let mut before = Vec::with_capacity(shard.blocks().len() + 1);
        let mut sum = Counts::default();
        before.push(sum);
        for block in shard.blocks() {
            sum = sum + block.counts();
            before.push(sum);
        }
        let (fields, documents) = (Vec::new(), Vec::new());
        let stamp = shard.info().file.stamp();
        Self {
            shard,
            stamp,
            before,
            fields,
            documents,
            empty_rows: OnceLock::new(),
            fields_bytes: 0,
            borders: None,
            checksums: None,
            document_checksums: Vec::new(),
        }
    }

    /// The token column of the file.
    pub fn shard(&self) -> &Shard {
        &self.shard
    }

    /// The counts before each block, and last the counts of the whole shard.
    pub fn before(&self) -> &[Counts] {
        &self.before
    }

    /// Bytes of the tables of this shard.
    pub fn index_bytes(&self) -> u64 {
        let of = |column: &Self| column.shard.index_bytes() + size_of_val(column.before.as_slice()) as u64;
        let documents = self.documents.iter().flatten().map(DocumentColumn::index_bytes);
        let empty = self.empty_rows.get().map_or(0, |rows| size_of_val(rows.as_slice()) as u64);
        self.columns().map(of).chain(documents).sum::<u64>() + empty
    }

    /// Whether the first token of block `block` continues a document of the previous block.
    pub fn continues(&self, block: usize) -> bool {
        self.before[block].starts > self.before[block].ends
    }
}

/// The shards of one source, in corpus order.
#[derive(Debug)]
pub struct Corpus {
    files: Vec<ShardFile>,
    facts: Facts,
    options: OpenOptions,
    shards: ShardCache<OpenShard>,
    dtype: Dtype,
    fields: FieldTypes,
    access: Access,
    fingerprint: String,
    warnings: Vec<String>,
    /// The saved index. `None` if nothing is saved.
    index: Option<IndexFile>,
    /// The saved checksums, and the record of each shard in them.
    checksums: Option<(Arc<SavedChecksums>, Vec<Option<usize>>)>,
}

/// Facts about all shards.
#[derive(Debug)]
enum Facts {
    /// The shards were opened, and these facts were found.
    Found(Vec<ShardFacts>),
    /// A saved index. Its record `i` describes shard `i`.
    Saved(SavedIndex),
}

impl Facts {
    fn get(&self, index: usize) -> ShardFacts {
        match self {
            Self::Found(facts) => facts[index],
            Self::Saved(saved) => saved.get(index).expect("every record was read when it was compared").1,
        }
    }
}

/// The result of bringing the index of a corpus up to date.
#[derive(Debug)]
pub struct Indexed {
    /// The file of the index.
    pub file: IndexFile,
    /// Number of shards that were opened, because they were new or changed.
    pub opened: u64,
    /// The reason why the index could not be saved. `None` if it was saved.
    pub unsaved: Option<Error>,
}

/// The result of saving checksums.
#[derive(Debug)]
pub struct Summed {
    /// The file of the checksums.
    pub file: ChecksumsFile,
    /// Size of the file in bytes.
    pub size_bytes: u64,
    /// Number of shards that were read, because they had no checksums.
    pub read: u64,
}

impl Corpus {
    /// Finds the shards of `data` and opens them.
    ///
    /// With a folder `cache`, only shards that are new or changed since the index there was saved
    /// are opened. An index that is missing, outdated or damaged is made anew. An index that cannot
    /// be saved is a warning.
    pub fn open(
        data: &[String],
        format: DataFormat,
        options: &OpenOptions,
        cache: Option<&Path>,
        pool: &rayon::ThreadPool,
    ) -> Result<Self> {
        if let Some(folder) = cache {
            return Ok(Self::index(data, format, options, folder, pool, &|_, _| ())?.0);
        }
        let Discovery { shards: files, mut warnings } = discover::find(&options.files, data, format)?;
        let most = most_open_shards(options);
        let shards = ShardCache::new(files.len(), most);
        let not_read = NotRead::default();
        let open = |index: usize| {
            options.cancel.check()?;
            let mut shard = open_on(pool, &files[index].path, options)?;
            not_read.add(shard.shard(), options);
            let facts = shard.facts();
            if files.len() * columns_of(options) > local::FEW_FILES {
                shard.let_go();
            }
            if files.len() <= most {
                shards.get_or_open(index, || Ok(shard))?;
            }
            Ok(facts)
        };
        let (mut facts, mut faults) = (Vec::with_capacity(files.len()), Vec::new());
        for (file, result) in files.iter().zip(side_by_side(pool, files.len(), open)) {
            result.map(|found| facts.push((&*file.path, found))).unwrap_or_else(|error| faults.push(error));
        }
        no_faults(faults, facts.iter().copied(), format, options)?;
        let facts = facts.into_iter().map(|(_, facts)| facts).collect();
        warnings.extend(not_read.warning());
        let mut corpus = Self::new(files, Facts::Found(facts), shards, options)?;
        corpus.warnings.extend(warnings);
        Ok(corpus)
    }

    /// Opens the corpus like [`Corpus::open`] with a folder.
    ///
    /// Calls `progress` with the number of opened shards and the number of shards to open.
    pub fn index(
        data: &[String],
        format: DataFormat,
        options: &OpenOptions,
        folder: &Path,
        pool: &rayon::ThreadPool,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<(Self, Indexed)> {
        let Discovery { shards: files, mut warnings } = discover::find(&options.files, data, format)?;
        let file = IndexFile::new(folder, data, format, options);
        let saved = file.load(options.io).unwrap_or_else(|error| {
            warnings.push(format!("{}; it is made anew", error.report()));
            None
        });
        let mut indexed = Indexed { file, opened: 0, unsaved: None };

        let places = PathHash::of_all(&options.files, &files);
        let known = known_records(&files, &places, saved.as_ref(), &options.files, pool);
        let stale: Vec<usize> = (0..files.len()).filter(|index| known[*index].is_none()).collect();
        let known_facts = |index: usize| Some(saved.as_ref()?.get(known[index]?)?.1);
        let facts = match &saved {
            Some(saved) if known.len() == saved.len() && is_in_order(&known) => {
                let facts = Facts::Saved(saved.clone());
                let described = files.iter().enumerate().map(|(index, file)| (&*file.path, facts.get(index)));
                no_faults(Vec::new(), described, format, options)?;
                facts
            }
            _ => {
                let (done, not_read) = (AtomicU64::new(0), NotRead::default());
                progress(0, stale.len() as u64);
                let open = |place: usize| {
                    options.cancel.check()?;
                    let opened = open_on(pool, &files[stale[place]].path, options);
                    let facts =
                        opened.inspect(|opened| not_read.add(opened.shard(), options)).map(|opened| opened.facts());
                    progress(done.fetch_add(1, Ordering::Relaxed) + 1, stale.len() as u64);
                    facts
                };
                let opened = side_by_side(pool, stale.len(), open);
                indexed.opened = stale.len() as u64;
                let mut known: Vec<_> = (0..files.len()).map(known_facts).collect();
                let mut faults = Vec::new();
                for (index, facts) in stale.iter().zip(opened) {
                    facts.map(|facts| known[*index] = Some(facts)).unwrap_or_else(|error| faults.push(error));
                }
                // A shard that cannot be opened is among the faults.
                let described = files.iter().zip(&known).filter_map(|(file, facts)| Some((&*file.path, (*facts)?)));
                no_faults(faults, described, format, options)?;
                let facts: Vec<ShardFacts> = known.into_iter().flatten().collect();
                warnings.extend(not_read.warning());
                if let Err(error) = indexed.file.save(places.iter().copied().zip(facts.iter().copied())) {
                    warnings.push(format!("{}; shards are opened at every start", error.report()));
                    indexed.unsaved = Some(error);
                }
                Facts::Found(facts)
            }
        };
        let shards = ShardCache::new(files.len(), most_open_shards(options));
        let mut corpus = Self::new(files, facts, shards, options)?;
        corpus.warnings.extend(warnings);
        corpus.load_checksums(&indexed.file.checksums())?;
        corpus.index = Some(indexed.file.clone());
        Ok((corpus, indexed))
    }

    /// Loads the saved checksums, if there are any.
    fn load_checksums(&mut self, file: &ChecksumsFile) -> Result<()> {
        let Some(saved) = file.load(self.options.io)? else { return Ok(()) };
        let records = saved.records(&self.shard_digests());
        let missing: Vec<usize> = (0..records.len()).filter(|shard| records[*shard].is_none()).collect();
        if let Some(first) = missing.first() {
            self.warnings.push(format!(
                "{} of {} shards have no checksums, because they are new or changed (`{}` is the first): damage in them \
                 is not noticed; run `forebay index --checksums` again",
                missing.len(),
                records.len(),
                escaped(&self.files[*first].path.to_string_lossy())
            ));
        }
        self.checksums = Some((Arc::new(saved), records));
        Ok(())
    }

    /// Saves checksums of all shards beside the index. Reads the shards that have none.
    ///
    /// Calls `progress` with the number of shards that were read and the number of shards to read.
    ///
    /// # Panics
    /// Panics if the corpus has no saved index.
    pub fn save_checksums(&mut self, pool: &rayon::ThreadPool, progress: &(dyn Fn(u64, u64) + Sync)) -> Result<Summed> {
        let file = self.index.as_ref().expect("checksums lie beside an index").checksums();
        let known = |shard: usize| {
            let (saved, records) = self.checksums.as_ref()?;
            Some(saved.hashes(records[shard]?))
        };
        let digests = self.shard_digests();
        let missing = (0..digests.len()).filter(|shard| known(*shard).is_none()).count() as u64;
        let done = AtomicU64::new(0);
        progress(0, missing);
        let of_shard = |shard: usize| {
            if let Some(hashes) = known(shard) {
                return Ok(hashes);
            }
            self.options.cancel.check()?;
            let hashes = self.shard(shard)?.hashes();
            progress(done.fetch_add(1, Ordering::Relaxed) + 1, missing);
            hashes
        };
        let (mut shards, mut faults) = (Vec::new(), Vec::new());
        for (digest, hashes) in digests.iter().zip(side_by_side(pool, digests.len(), of_shard)) {
            hashes.map(|hashes| shards.push((*digest, hashes))).unwrap_or_else(|error: Error| faults.push(error));
        }
        match faults.len() {
            0 => {}
            1 => return Err(faults.remove(0)),
            _ => return Err(Error::all(faults)),
        }
        let size_bytes = file.save(&shards)?;
        self.load_checksums(&file)?;
        Ok(Summed { file, size_bytes, read: missing })
    }

    /// Reads the shards that `takes` chooses and that have saved checksums, and compares both.
    /// Returns every fault.
    pub fn damage(&self, pool: &rayon::ThreadPool, takes: impl Fn(usize) -> bool + Sync) -> Vec<Error> {
        let Some((_, records)) = &self.checksums else { return Vec::new() };
        let of_shard = |shard: usize| match records[shard] {
            Some(_) if takes(shard) => self.shard(shard).map_or_else(|error| vec![error], |shard| shard.damage()),
            _ => Vec::new(),
        };
        side_by_side(pool, self.len(), of_shard).into_iter().flatten().collect()
    }

    /// Whether checksums are saved in `folder` for the corpus that `data` and the other settings
    /// describe.
    pub fn has_saved_checksums(data: &[String], format: DataFormat, options: &OpenOptions, folder: &Path) -> bool {
        IndexFile::new(folder, data, format, options).checksums().is_there()
    }

    /// Makes the schema of the further columns `names` of the opened `corpora`, each with its name.
    ///
    /// An error about the types of a single corpus names its first shard with tokens.
    pub fn schema(corpora: &[(String, Self)], names: &[String], ignore_index: i64) -> Result<Schema> {
        let stored =
            |column: usize| corpora.iter().map(|(name, corpus)| (name.as_str(), corpus.field_type(column))).collect();
        Schema::of(names, ignore_index, stored).map_err(|error| Self::at_shard(corpora, error))
    }

    /// Adds the first shard with tokens to an `error` about the content of a single corpus.
    pub(crate) fn at_shard(corpora: &[(String, Self)], error: Error) -> Error {
        let [(_, corpus)] = corpora else { return error };
        let full = corpus.facts().position(|facts| facts.blocks > 0);
        match corpus.files.get(full.unwrap_or(0)) {
            Some(file) if error.kind() == ErrorKind::Data => error.at(&file.path),
            _ => error,
        }
    }

    fn new(files: Vec<ShardFile>, facts: Facts, shards: ShardCache<OpenShard>, options: &OpenOptions) -> Result<Self> {
        let mut corpus = Self {
            files,
            facts,
            options: options.clone(),
            shards,
            dtype: Dtype::I32,
            fields: FieldTypes::default(),
            access: Access::Random,
            fingerprint: String::new(),
            warnings: Vec::new(),
            index: None,
            checksums: None,
        };
        let most = corpus.facts().map(|facts| facts.blocks).max().unwrap_or(0).max(corpus.len() as u64);
        if u32::try_from(most).is_err() {
            return Err(Error::data("corpus has more than 2^32 shards or blocks in a shard"));
        }
        let doubtful = corpus.facts().position(|facts| facts.blocks > 0 && facts.column.is_doubtful(options));
        if let Some(index) = doubtful {
            corpus.warnings.push(format!(
                "each row of column `{}` is taken for one token, and a shard for one document (`{}`); set `token_column` to \
                 say so, or to another column",
                corpus.facts.get(index).column.name(options),
                corpus.files[index].path.display()
            ));
        }
        if let Some(split) = &options.split
            && corpus.tokens() > 0
            && corpus.facts().all(|facts| !facts.format.entry().has_lengths && facts.counts.starts <= 1)
        {
            corpus.warnings.push(format!(
                "no shard has more than one document: `document_end_id` = {} may be another id than the one that ends \
                 documents (`{}`)",
                split.id,
                corpus.files[0].path.display()
            ));
        }
        // A shard without blocks does not show whether shards of this corpus are decoded.
        let typical = corpus.facts().find(|facts| facts.blocks > 0).or_else(|| corpus.facts().next());
        if let Some(typical) = typical {
            (corpus.dtype, corpus.fields, corpus.access) = (typical.dtype, typical.fields, typical.access);
        }
        corpus.fingerprint = corpus.fingerprint_of(corpus.len());
        Ok(corpus)
    }

    /// The number of shards.
    pub fn len(&self) -> usize {
        self.files.len()
    }

    /// Whether there are no shards.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// The paths of the shards, and their names relative to the roots they were found under.
    pub fn files(&self) -> &[ShardFile] {
        &self.files
    }

    /// The facts about each shard, in corpus order.
    pub fn facts(&self) -> impl ExactSizeIterator<Item = ShardFacts> + '_ {
        (0..self.len()).map(|index| self.facts.get(index))
    }

    /// Tokens and documents of each shard, in corpus order.
    pub fn counts(&self) -> impl ExactSizeIterator<Item = Counts> + '_ {
        self.facts().map(|facts| facts.counts)
    }

    /// Returns shard `index`. Opens it if it is closed, and then compares it with the known facts.
    pub fn shard(&self, index: usize) -> Result<Held<'_, OpenShard>> {
        self.shards.get_or_open(index, || {
            let mut opened = OpenShard::open(&self.files[index].path, &self.options)?;
            check_indexed(self.facts.get(index), opened.facts()).map_err(|error| error.at(opened.shard.path()))?;
            if let Some((saved, records)) = &self.checksums
                && let Some(record) = records[index]
            {
                opened.take_checksums(saved, record).map_err(|error| error.at(opened.shard.path()))?;
            }
            Ok(opened)
        })
    }

    /// Returns shard `index`, if it is open.
    pub fn opened(&self, index: usize) -> Option<Held<'_, OpenShard>> {
        self.shards.get(index)
    }

    /// The file that holds the lengths of all documents. `None` if nothing is saved.
    pub fn lengths_file(&self) -> Option<LengthsFile> {
        self.index.as_ref().map(IndexFile::lengths)
    }

    /// The file that holds the table of the settings that `name` describes. `None` if nothing is
    /// saved. The table of other shards is not found.
    pub fn table_file(&self, name: &str) -> Option<TableFile> {
        let digests = self.shard_digests();
        self.index.as_ref().map(|index| index.table(name, &digests))
    }

    /// A digest of each shard: its path, size, time, token column and counts.
    pub fn shard_digests(&self) -> Vec<u128> {
        let places = PathHash::of_all(&self.options.files, &self.files);
        places.into_iter().zip(self.facts()).map(|(place, facts)| index::digest(place, &facts)).collect()
    }

    /// The first shard with tokens that does not say where its documents end. `None` if there is
    /// none, or if an id splits such files.
    pub fn without_documents(&self) -> Option<(&Path, Format)> {
        let lacks =
            |facts: &ShardFacts| facts.blocks > 0 && !facts.format.entry().has_lengths && facts.column.is_plain();
        let (file, facts) = self.files.iter().zip(self.facts()).find(|(_, facts)| lacks(facts))?;
        Some((&file.path, facts.format))
    }

    /// Bytes that were scanned for the id that ends documents, and the seconds that the scans of
    /// all shards took together. Counts all corpora that were opened with the same options.
    pub fn scanned(&self) -> Option<(u64, f64)> {
        Some(self.options.split.as_ref()?.scanned())
    }

    /// How files are read.
    pub fn io(&self) -> Io {
        self.options.io
    }

    /// Faults of the saved index that are no errors, one line each.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Type of the token ids on disk.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// How tokens are read: `Block` if any shard must be decoded.
    pub fn access(&self) -> Access {
        self.access
    }

    /// Number of tokens on disk.
    pub fn tokens(&self) -> u64 {
        self.counts().map(|counts| counts.tokens).sum()
    }

    /// Number of documents with tokens.
    pub fn documents(&self) -> u64 {
        self.counts().map(|counts| counts.starts).sum()
    }

    /// Bytes of the shards that lie in object stores.
    pub fn remote_bytes(&self) -> u64 {
        let files = self.files.iter().zip(self.facts());
        files.filter(|(file, _)| storage::is_remote(&file.path)).map(|(_, facts)| facts.stamp.size_bytes).sum()
    }

    /// Bytes of all blocks when decoded. 0 if nothing is decoded.
    pub fn decoded_bytes(&self) -> u64 {
        self.facts().map(|facts| facts.decoded_bytes).sum()
    }

    /// Bytes of the largest block when decoded.
    pub fn largest_block_bytes(&self) -> u64 {
        self.facts().map(|facts| facts.largest_block_bytes).max().unwrap_or(0)
    }

    /// Number of blocks with tokens.
    pub fn blocks(&self) -> u64 {
        self.facts().map(|facts| facts.blocks).sum()
    }

    /// The facts about shard `index`.
    pub fn facts_of(&self, index: usize) -> ShardFacts {
        self.facts.get(index)
    }

    /// Bytes of the table of shards, and of the tables of the open shards. A saved index is mapped
    /// and not counted.
    pub fn index_bytes(&self) -> u64 {
        let path = |file: &ShardFile| size_of_val(file) + file.path.as_os_str().len() + file.name.len();
        let files: usize = self.files.iter().map(path).sum();
        let facts = if let Facts::Found(facts) = &self.facts { size_of_val(facts.as_slice()) } else { 0 };
        let checksums = self
            .checksums
            .as_ref()
            .map_or(0, |(saved, records)| saved.held_bytes() + size_of_val(records.as_slice()) as u64);
        (files + facts) as u64 + checksums + self.open_shards().map(|shard| shard.index_bytes()).sum::<u64>()
    }

    /// Number of shards that may be open at the same time.
    pub fn most_open(&self) -> usize {
        self.len().min(most_open_shards(&self.options))
    }

    /// The shards that are open.
    pub fn open_shards(&self) -> impl Iterator<Item = Held<'_, OpenShard>> {
        (0..self.len()).filter_map(|index| self.opened(index))
    }

    /// The type in which field `index` is stored. `None` if the corpus lacks the field.
    ///
    /// All shards with tokens have the same type. A shard without tokens may lack the column.
    pub fn field_type(&self, index: usize) -> Option<FieldType> {
        self.fields.get(index)
    }

    /// The further columns that the corpus was opened with.
    pub fn fields(&self) -> &[String] {
        &self.options.fields
    }

    /// Digest of names, sizes, counts and types. Absolute paths and times are not part of it.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Name of the token column of shard `index`.
    pub fn token_column(&self, index: usize) -> &str {
        self.facts.get(index).column.name(&self.options)
    }

    /// The token columns of the first `shards` shards, each once, in corpus order.
    pub fn token_columns(&self, shards: usize) -> Vec<&str> {
        let mut columns = Vec::new();
        // Shards without tokens count only if no shard has tokens.
        let is_empty = !self.facts().take(shards).any(|facts| facts.blocks > 0);
        for facts in self.facts().take(shards).filter(|facts| is_empty || facts.blocks > 0) {
            let column = facts.column.name(&self.options);
            if !columns.contains(&column) {
                columns.push(column);
            }
        }
        columns
    }

    /// The families of formats of the first `shards` shards, each once, in corpus order.
    pub fn families(&self, shards: usize) -> Vec<&'static str> {
        let mut families = Vec::new();
        for facts in self.facts().take(shards) {
            let family = facts.format.family().name();
            if !families.contains(&family) {
                families.push(family);
            }
        }
        families
    }

    /// The fingerprint of a corpus of the first `shards` shards alone.
    ///
    /// Costs a hash of some 50 bytes per shard.
    ///
    /// # Panics
    /// Panics if there are fewer shards.
    pub fn fingerprint_of(&self, shards: usize) -> String {
        let mut hash = Xxh3::new();
        let mut text = |text: &str| {
            hash.update(&(text.len() as u64).to_le_bytes());
            hash.update(text.as_bytes());
        };
        for (file, facts) in self.files[..shards].iter().zip(self.facts()) {
            text(&file.name);
            text(facts.format.name());
            text(facts.dtype.name());
            let Counts { tokens, starts, .. } = facts.counts;
            text(&format!("{} {} {tokens} {starts}", facts.stamp.size_bytes, facts.rows));
            for (index, name) in self.options.fields.iter().enumerate() {
                text(name);
                let found = facts.fields.get(index);
                if matches!(found, Some(FieldType::PerDocument(_))) {
                    text("per document");
                }
                text(found.map_or("missing", FieldType::name));
            }
        }
        format!("{:032x}", hash.digest128())
    }
}

/// Number of files and columns that are read for each shard.
fn columns_of(options: &OpenOptions) -> usize {
    let has_ends = options.split.as_ref().is_some_and(|split| split.folder.is_some());
    1 + options.fields.len() + usize::from(options.borders.is_some()) + usize::from(has_ends)
}

/// Number of shards that may be open at the same time. Each column has its own file handle.
fn most_open_shards(options: &OpenOptions) -> usize {
    (local::most_files() / columns_of(options)).max(1)
}

/// Whether a file could not be opened because it lacks the column that was asked for.
fn is_missing_column(error: &Error) -> bool {
    std::error::Error::source(error).is_some_and(|cause| cause.is::<MissingColumn>())
}

/// Columns that look like labels, masks or weights, but are not read. Maps each to a shard that has
/// it.
#[derive(Debug, Default)]
struct NotRead(Mutex<BTreeMap<String, String>>);

impl NotRead {
    /// Notes such columns of `shard`. Threads open shards in parallel.
    fn add(&self, shard: &Shard, options: &OpenOptions) {
        let telling = |name: &&String| {
            let is_read = options.fields.contains(name) || options.borders.as_ref() == Some(name);
            format::looks_like(name).is_some() && !is_read
        };
        for name in shard.info().not_read.iter().filter(telling) {
            let path = shard.path().display().to_string();
            let mut found = lock(&self.0);
            // The message names the same shard at each start, whichever thread comes first.
            let first = found.entry(name.clone()).or_insert_with(|| path.clone());
            if path < *first {
                *first = path;
            }
        }
    }

    /// The warning for the user.
    fn warning(&self) -> Option<String> {
        let found = lock(&self.0);
        let kind = |name: &str| format::looks_like(name);
        let is_start = |name: &str| kind(name) == Some(format::STARTS_OF_DOCUMENTS);
        let starts = found.iter().find(|(name, _)| is_start(name.as_str())).map(|(name, path)| {
            format!("`{name}` says where documents begin in rows, and is not read, as in `{path}`: set `packed_by`")
        });
        // The file tells whether the mask is 1 at every token. `fields` refuses any other mask.
        let is_attention = |name: &str| name == "attention_mask";
        let attention = found.iter().find(|(name, _)| is_attention(name.as_str())).map(|(name, path)| {
            format!(
                "`{name}` is not read, as in `{path}`: rows must hold no padding, because every token counts; name it in \
                 `fields` to have each value checked"
            )
        });
        let listed = |of_places: bool| {
            let is_one = move |(name, _): &(&String, &String)| {
                !is_start(name.as_str())
                    && !is_attention(name.as_str())
                    && (kind(name.as_str()) == Some(format::PLACES)) == of_places
            };
            let names: Vec<String> =
                found.iter().filter(is_one).map(|(name, _)| format!("`{}`", escaped(name))).collect();
            let [verb, them] = if names.len() == 1 { ["is", "it"] } else { ["are", "them"] };
            found.iter().filter(is_one).map(|(_, path)| path).min().map(|path| {
                let otherwise = if of_places {
                    "if a model needs it, and set `packed_by` if rows were packed before"
                } else {
                    "or prompts and padding become targets too"
                };
                let comma = if of_places { "" } else { "," };
                format!(
                    "{} {verb} not read, as in `{path}`: name {them} in `fields`{comma} {otherwise}",
                    names.join(", ")
                )
            })
        };
        let others = listed(false).into_iter().chain(listed(true));
        let all: Vec<String> = others.chain(attention).chain(starts).collect();
        (!all.is_empty()).then(|| all.join("; "))
    }
}

/// Opens the shard at `path`. If its ids are scanned, all threads of `pool` share the work.
fn open_on(pool: &rayon::ThreadPool, path: &Path, options: &OpenOptions) -> Result<OpenShard> {
    let open = || OpenShard::open(path, options);
    if options.split.is_some() { pool.install(open) } else { open() }
}

/// Finds for each file its record in `saved`. `None` if the file has another size or time now.
fn known_records(
    files: &[ShardFile],
    places: &[PathHash],
    saved: Option<&SavedIndex>,
    storage: &Files,
    pool: &rayon::ThreadPool,
) -> Vec<Option<usize>> {
    let Some(saved) = saved else { return vec![None; files.len()] };
    // Shards mostly keep their place in the index. The table of the other places is made only when
    // a shard has moved.
    let others: OnceLock<HashMap<PathHash, usize>> = OnceLock::new();
    let elsewhere = |place: PathHash| -> Option<usize> {
        let table = others.get_or_init(|| {
            let records = (0..saved.len()).filter_map(|index| Some((saved.get(index)?.0, index)));
            records.collect()
        });
        table.get(&place).copied()
    };
    let known = |index: usize| {
        let is_here = index < saved.len() && saved.get(index).is_some_and(|(place, _)| place == places[index]);
        let record = if is_here { index } else { elsewhere(places[index])? };
        // A file whose `stat` fails is opened, and the error of opening tells why.
        let path = &files[index].path;
        let stamp = format::stamp_with_beside(storage, path, storage.stat(path).ok()?.stamp).ok()?;
        (stamp == saved.get(record)?.1.stamp).then_some(record)
    };
    side_by_side(pool, files.len(), known)
}

/// Returns the result of `work` for each of `0..count`, in order.
///
/// The threads of `pool` and the caller work in parallel. Otherwise the caller would only wait.
pub(crate) fn side_by_side<T: Send + Sync>(
    pool: &rayon::ThreadPool,
    count: usize,
    work: impl Fn(usize) -> T + Sync,
) -> Vec<T> {
    let results: Vec<OnceLock<T>> = std::iter::repeat_with(OnceLock::new).take(count).collect();
    let next = AtomicUsize::new(0);
    let take = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(result) = results.get(index) else { break };
            let _ = result.set(work(index));
        }
    };
    pool.in_place_scope(|scope| {
        for _ in 0..pool.current_num_threads().min(count.saturating_sub(1)) {
            scope.spawn(|_| take());
        }
        take();
    });
    results.into_iter().map(|result| result.into_inner().expect("each was taken by one thread")).collect()
}

fn is_in_order(records: &[Option<usize>]) -> bool {
    records.iter().enumerate().all(|(index, record)| *record == Some(index))
}

/// Fails if an opened shard differs from its record in the index. The sizes of blocks are not
/// compared, because only budgets need them.
fn check_indexed(indexed: ShardFacts, found: ShardFacts) -> Result<()> {
    let changed = |what: &str, then: &dyn fmt::Debug, now: &dyn fmt::Debug| {
        Err(Error::new(
            ErrorKind::Changed,
            format!(
                "shard changed since it was indexed: {what} was {then:?} and is {now:?}; start again, so that it is indexed anew"
            ),
        ))
    };
    let (then, now) = (indexed.stamp, found.stamp);
    if now.size_bytes != then.size_bytes {
        return changed("its size in bytes", &then.size_bytes, &now.size_bytes);
    }
    if now != then {
        return changed("its modification time", &then.modified, &now.modified);
    }
    // Size and time are the same, so that the next start would believe the index again.
    let content = |facts: ShardFacts| {
        (facts.format, facts.dtype, facts.column, facts.access, facts.rows, facts.counts, facts.fields)
    };
    if content(found) != content(indexed) {
        return Err(Error::new(
            ErrorKind::Changed,
            format!(
                "shard is another file than the indexed one, with the same size and modification time: expected {} rows and {} {} tokens, found {} rows \
                 and {} {} tokens; remove the index from `cache_dir`",
                indexed.rows,
                indexed.counts.tokens,
                indexed.dtype.name(),
                found.rows,
                found.counts.tokens,
                found.dtype.name(),
            ),
        ));
    }
    Ok(())
}

/// Fails with `faults`, and with faults that show only when all shards are seen together.
fn no_faults<'a>(
    mut faults: Vec<Error>,
    shards: impl Iterator<Item = (&'a Path, ShardFacts)> + Clone,
    format: DataFormat,
    options: &OpenOptions,
) -> Result<()> {
    faults.extend(mixed_shards(shards.clone(), options));
    faults.extend(unexpected_shard(shards, format));
    if faults.is_empty() { Ok(()) } else { Err(Error::all(faults)) }
}

/// Finds shards that cannot be in one corpus: shards with different token columns, types, or ways
/// of reading.
pub fn mixed_shards<'a>(
    shards: impl Iterator<Item = (&'a Path, ShardFacts)> + Clone,
    options: &OpenOptions,
) -> Vec<Error> {
    let Some((first_path, first)) = shards.clone().next() else { return Vec::new() };
    let mut faults = Vec::new();
    if let Some((path, other)) = shards.clone().find(|(_, facts)| facts.format.family() != first.format.family()) {
        faults.push(Error::data(format!(
            "formats differ between shards: `{}` is {}, `{}` is {}; load them as two corpora, or set `format`",
            first_path.display(),
            first.format.name(),
            path.display(),
            other.format.name()
        )));
        return faults;
    }
    // A shard without tokens fits every corpus. Writers give it any type, and nothing is read from
    // it.
    let mut full = shards.filter(|(_, facts)| facts.blocks > 0);
    let Some((first_path, first)) = full.clone().next() else { return faults };
    if let Some(error) = mixed_columns(full.clone(), options) {
        faults.push(error);
        return faults;
    }
    if let Some((path, other)) = full.clone().find(|(_, facts)| facts.dtype != first.dtype) {
        faults.push(Error::data(format!(
            "token types differ between shards: `{}` has {}, `{}` has {}; rewrite them with one type",
            first_path.display(),
            first.dtype.name(),
            path.display(),
            other.dtype.name()
        )));
    }
    for index in 0..MAX_FIELDS {
        if let Some((path, other)) = full.clone().find(|(_, facts)| facts.fields.get(index) != first.fields.get(index))
        {
            let shown = |facts: ShardFacts| match facts.fields.get(index) {
                None => "no such column".to_owned(),
                Some(FieldType::PerToken(dtype)) => format!("{} for each token", dtype.name()),
                Some(FieldType::PerDocument(kind)) => format!("{} for each document", kind.name()),
            };
            faults.push(Error::data(format!(
                "types of column `{}` differ between shards: `{}` has {}, `{}` has {}; rewrite them with one type",
                options.fields.get(index).map_or(Cow::default(), |name| escaped(name)),
                first_path.display(),
                shown(first),
                path.display(),
                shown(other)
            )));
        }
    }
    if let Some((path, _)) = full.find(|(_, facts)| facts.access != first.access) {
        faults.push(Error::data(format!(
            "compressed and uncompressed Arrow shards cannot be mixed: `{}` and `{}` differ; rewrite them alike",
            first_path.display(),
            path.display()
        )));
    }
    faults
}

/// The error for two shards whose token columns differ in name, or where only one holds lists.
///
/// Shards without tokens are ignored.
pub fn mixed_columns<'a>(shards: impl Iterator<Item = (&'a Path, ShardFacts)>, options: &OpenOptions) -> Option<Error> {
    let mut full = shards.filter(|(_, facts)| facts.blocks > 0);
    let (first_path, first) = full.next()?;
    let (path, other) = full.find(|(_, facts)| facts.column != first.column)?;
    Some(Error::data(format!(
        "token columns differ between shards: `{}` has {}, `{}` has {}; name the column with `token_column`, or load \
         them as two corpora",
        first_path.display(),
        first.column.describe(options),
        path.display(),
        other.column.describe(options)
    )))
}

/// Finds the first shard of another format than the setting `format` allows.
fn unexpected_shard<'a>(mut shards: impl Iterator<Item = (&'a Path, ShardFacts)>, format: DataFormat) -> Option<Error> {
    if format == DataFormat::Auto {
        return None;
    }
    let (path, facts) = shards.find(|(_, facts)| facts.format.family() != format)?;
    let message = format!("`format` is {}, but this shard is {}", format.name(), facts.format.name());
    Some(Error::data(message).at(path))
}
