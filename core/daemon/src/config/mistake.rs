//! Mistakes of a file, and how they are shown: each with file, line, the text underlined and what to write instead.

use miette::{
    Diagnostic, GraphicalReportHandler, GraphicalTheme, LabeledSpan, MietteError, NamedSource, SourceCode,
    SourceSpan, SpanContents,
};
use std::{fmt, io::IsTerminal, ops::Range, path::Path, sync::Arc};

/// Where in the text of a file something stands, in bytes.
pub type Span = Range<usize>;

/// One thing that is wrong with a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    /// The text that is wrong.
    pub span: Span,
    /// What is wrong, as a sentence without a full stop.
    pub message: String,
    /// What is said below the underlined text; may be empty.
    pub label: String,
    /// What to do about it.
    pub help: Option<String>,
}

impl Mistake {
    /// A mistake at a place.
    pub fn new(span: Span, message: impl fmt::Display) -> Self {
        Self { span, message: message.to_string(), label: String::new(), help: None }
    }

    /// The same, with a word below the underlined text.
    #[must_use]
    pub fn label(mut self, label: impl fmt::Display) -> Self {
        self.label = label.to_string();
        self
    }

    /// The same, with what to do about it.
    #[must_use]
    pub fn help(mut self, help: impl fmt::Display) -> Self {
        self.help = Some(help.to_string());
        self
    }

    /// The same, offering the valid name that is most like `name`, or all of them if they are few.
    #[must_use]
    pub fn nearest<'a>(self, name: &str, valid: impl Iterator<Item = &'a str> + Clone) -> Self {
        const FEW: usize = 20;
        if let Some(nearest) = driveline_graph::nearest(name, valid.clone()) {
            return self.label(format_args!("did you mean '{nearest}'?"));
        }
        let names: Vec<_> = valid.map(|name| format!("'{name}'")).collect();
        match names.len() {
            0 => self,
            1..=FEW => self.help(format_args!("valid here: {}", names.join(", "))),
            _ => self,
        }
    }
}

/// All mistakes of a file.
#[derive(Clone)]
pub struct Mistakes {
    file: Arc<str>,
    text: Arc<str>,
    list: Vec<Mistake>,
}

impl Mistakes {
    /// None yet.
    pub fn new(file: &Path, text: &str) -> Self {
        Self { file: file.display().to_string().into(), text: text.into(), list: Vec::new() }
    }

    /// Adds one; what was said already about the same text is not said again.
    pub fn add(&mut self, mistake: Mistake) {
        let known = |m: &Mistake| m.span == mistake.span && m.message == mistake.message;
        if !self.list.iter().any(known) {
            self.list.push(mistake);
        }
    }

    /// Are there none?
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// All of them, in the order of the file.
    pub fn list(&self) -> Vec<Mistake> {
        let mut list = self.list.clone();
        list.sort_by_key(|mistake| (mistake.span.start, mistake.span.end));
        list
    }

    /// The line that a place is on, counted from 1.
    pub fn line(&self, span: &Span) -> usize {
        let before = &self.text.as_bytes()[..span.start.min(self.text.len())];
        before.iter().filter(|byte| **byte == b'\n').count() + 1
    }

    /// All of them as text; in colour and with lines for a terminal, else with ASCII alone.
    pub fn render(&self, terminal: bool) -> String {
        let theme = match (terminal, std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())) {
            (true, false) => GraphicalTheme::unicode(),
            (true, true) => GraphicalTheme::unicode_nocolor(),
            (false, _) => GraphicalTheme::none(),
        };
        let handler = GraphicalReportHandler::new_themed(theme).with_links(false).with_context_lines(1);
        let handler = if terminal { handler } else { handler.with_width(200) };
        let source = NamedSource::new(&self.file, self.text.clone());
        let mut out = String::new();
        for mistake in self.list() {
            let shown = Shown { mistake: &mistake, source: &source };
            handler.render_report(&mut out, &shown).expect("a string takes any text");
        }
        let count = self.list.len();
        let s = if count == 1 { "" } else { "s" };
        out.push_str(&format!("{count} mistake{s} in {}\n", self.file));
        out
    }

    /// Prints all of them where people look for errors.
    pub fn print(&self) {
        eprint!("{}", self.render(std::io::stderr().is_terminal()));
    }
}

/// One line each, as in `vm.toml:12: unknown key 'iosp' in node 'limit'; did you mean 'iops'?`.
impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, mistake) in self.list().iter().enumerate() {
            let line = self.line(&mistake.span);
            write!(f, "{}{}:{line}: {}", if index > 0 { "\n" } else { "" }, self.file, mistake.message)?;
            if !mistake.label.is_empty() {
                write!(f, "; {}", mistake.label)?;
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Mistakes {}

/// A mistake with its file, as miette wants to see it.
struct Shown<'a> {
    mistake: &'a Mistake,
    source: &'a NamedSource<Arc<str>>,
}

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.mistake.message)
    }
}

impl fmt::Debug for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Shown<'_> {}

impl Diagnostic for Shown<'_> {
    fn source_code(&self) -> Option<&dyn SourceCode> {
        Some(self)
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        // An underline of nothing, or of the end of a line, would not be seen.
        let (start, length) = (self.mistake.span.start, self.mistake.span.len().clamp(1, SHOWN_BYTES));
        let text = self.source.inner().as_bytes();
        let at_end = start > 0 && text.get(start).is_none_or(|byte| *byte == b'\n');
        let start = if at_end && text[start - 1] != b'\n' { start - 1 } else { start };
        let label = (!self.mistake.label.is_empty()).then(|| self.mistake.label.clone());
        let end = self.source.inner().ceil_char_boundary(start + length);
        let span = LabeledSpan::new(label, start, end - start);
        Some(Box::new(std::iter::once(span)))
    }

    fn help(&self) -> Option<Box<dyn fmt::Display + '_>> {
        self.mistake.help.as_ref().map(|help| Box::new(help) as _)
    }
}

/// More than this of a line is shown on neither side of what is wrong in it. (miette keeps columns in 16 bits, for one.)
const SHOWN_BYTES: usize = 2000;

/// The line that is wrong says enough: its neighbours are not shown.
impl SourceCode for Shown<'_> {
    fn read_span<'a>(
        &'a self,
        span: &SourceSpan,
        lines_before: usize,
        _: usize,
    ) -> Result<Box<dyn SpanContents<'a> + 'a>, MietteError> {
        if lines_before == 0 {
            return self.source.read_span(span, 0, 0);
        }
        let text = self.source.inner().as_bytes();
        let (start, end) = (span.offset(), span.offset() + span.len());
        let start = text[..start].iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let end = text[end.max(1) - 1..]
            .iter()
            .position(|byte| *byte == b'\n')
            .map_or(text.len(), |at| end.max(1) - 1 + at);
        let end = end.max(start);
        let text = self.source.inner();
        let first = text.floor_char_boundary(span.offset().saturating_sub(SHOWN_BYTES).max(start));
        let last = text.ceil_char_boundary((span.offset() + span.len()).saturating_add(SHOWN_BYTES).min(end));
        self.source.read_span(&(first, last.max(first) - first).into(), 0, 0)
    }
}
