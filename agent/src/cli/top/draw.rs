//! Draws `ebb top`. Decides nothing but colours.

use ebb_core::{flow::FlowCounts, format::shortened};
use ratatui::{
    Frame,
    layout::{Constraint, Layout, Rect},
    style::{Color, Modifier, Style},
    text::{Line, Span},
    widgets::{Block, Clear, Paragraph},
};

use super::{
    KEYS,
    cells::{self, Cell, Column, Fit, Tone, elided, gap, widths},
    frame::summary,
    rows::{Answers, PodRow, Rows, pod_rows, sort_columns},
    state::{TopState, View},
};

/// Lines besides the rows: title, path, names of the columns, keys.
const OTHER_LINES: u16 = 4;

/// How many rows a screen of this height shows.
pub(super) fn visible_rows(height: u16) -> usize {
    height.saturating_sub(OTHER_LINES).into()
}

/// Colours, or only weights.
#[derive(Clone, Copy)]
pub(super) struct Theme {
    colours: bool,
}

impl Theme {
    /// Without colours if `NO_COLOR` is set and not empty (no-color.org).
    pub(super) fn from_environment() -> Self {
        let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self { colours: !no_color }
    }

    fn style(self, tone: Tone) -> Style {
        let style = Style::new();
        match (tone, self.colours) {
            (Tone::Plain, _) | (Tone::Live, false) => style,
            (Tone::Strong, _) => style.add_modifier(Modifier::BOLD),
            (Tone::Faint, _) => style.add_modifier(Modifier::DIM),
            (Tone::Live, true) => style.fg(Color::Green),
            (Tone::Draining, true) => style.fg(Color::Yellow),
            (Tone::Bad, true) => style.fg(Color::Red).add_modifier(Modifier::BOLD),
            (Tone::Draining | Tone::Bad, false) => style.add_modifier(Modifier::BOLD),
        }
    }

    fn span(self, cell: &Cell) -> Span<'_> {
        Span::styled(&cell.text, self.style(cell.tone))
    }
}

/// What is drawn.
pub(super) struct Picture<'a> {
    pub(super) state: &'a TopState,
    pub(super) answers: &'a Answers,
    pub(super) rows: &'a Rows<'a>,
    /// The time of the last answer.
    pub(super) at: &'a str,
    /// Why there is no newer one.
    pub(super) problem: Option<&'a str>,
    pub(super) theme: Theme,
}

impl Picture<'_> {
    pub(super) fn draw(&self, frame: &mut Frame<'_>) {
        let lines = [1, 1, 1].map(Constraint::Length).into_iter();
        let lines = lines.chain([Constraint::Min(0), Constraint::Length(1)]);
        let [title, path, header, body, keys] = Layout::vertical(lines).areas(frame.area());
        self.title(frame, title);
        self.path(frame, path);
        self.more(frame, path);
        match self.rows {
            Rows::Pods(rows) => {
                let cells = |row: &PodRow<'_>| cells::pod(row);
                self.list(frame, header, body, &cells::POD_COLUMNS, rows, cells);
            }
            Rows::Drains(rows) => {
                let columns = &cells::DRAIN_COLUMNS;
                self.list(frame, header, body, columns, rows, |r| cells::drain(r));
            }
            Rows::Flows(rows) => {
                let columns = &cells::FLOW_COLUMNS;
                self.list(frame, header, body, columns, rows, |f| cells::flow(f));
            }
            Rows::Text(lines) => {
                let shown = lines.iter().skip(self.state.page().top);
                for (line, area) in shown.zip(body.rows()) {
                    let spans = line.iter().map(|cell| self.theme.span(cell));
                    frame.render_widget(spans.collect::<Line<'_>>(), area);
                }
            }
            Rows::Unknown => frame.render_widget("waiting for the agent …", body),
        }
        self.keys(frame, keys);
        if self.state.help {
            help(frame);
        }
    }

    fn title(&self, frame: &mut Frame<'_>, area: Rect) {
        let strong = self.theme.style(Tone::Strong);
        let text = format!("ebb top  {}", self.totals());
        frame.render_widget(Line::styled(text, strong), area);
        // Over the end of a title that is too long.
        let at = Line::from(format!(" {}", self.at)).right_aligned();
        let [_, right] =
            Layout::horizontal([Constraint::Min(0), Constraint::Length(at.width() as u16)])
                .areas(area);
        frame.render_widget(at, right);
    }

    /// The sums of the view.
    fn totals(&self) -> String {
        match &self.state.page().view {
            View::Pods => self.answers.pods.as_ref().map(|pods| {
                let rows: Vec<_> = pod_rows(pods, self.answers.drains.as_ref()).collect();
                summary(&rows)
            }),
            View::Drains | View::DrainReport(..) => self.answers.drains.as_ref().map(|list| {
                let under_way = list.drains.iter().filter(|r| r.reason.is_none()).count();
                let ended = list.drains.len() - under_way;
                format!("drains: {under_way} under way, {ended} ended")
            }),
            View::Flows(pod) | View::FlowDetails(pod, _) => {
                self.answers.flows_of(&pod.uid).map(|list| {
                    let mut counts = FlowCounts::default();
                    list.flows.iter().for_each(|flow| counts.add(flow.state));
                    let (all, live) = (counts.total(), counts.live());
                    format!("{all} flows, {live} live and {} idle", counts.idle)
                })
            }
        }
        .unwrap_or_default()
    }

    /// The filter that is being typed, or a problem, or the way to the page.
    fn path(&self, frame: &mut Frame<'_>, area: Rect) {
        let page = self.state.page();
        if self.state.typing {
            let text = format!("filter: {}", page.filter);
            let cursor = Style::new().add_modifier(Modifier::REVERSED);
            let line = Line::from(vec![text.into(), Span::styled(" ", cursor)]);
            return frame.render_widget(line, area);
        }
        if let Some(problem) = self.problem {
            let style = self.theme.style(Tone::Bad);
            return frame.render_widget(Line::styled(problem, style), area);
        }
        let place = |view: &View| match view {
            View::Pods => "node".to_owned(),
            View::Drains => "drains".to_owned(),
            View::Flows(pod) => pod.to_string(),
            View::FlowDetails(_, flow) => flow.remote().to_string(),
            View::DrainReport(pod, _) => format!("drain of {pod}"),
        };
        let path: Vec<_> = self.state.path().map(place).collect();
        let filter = match page.filter.as_str() {
            "" => String::new(),
            filter => format!("  filter: {filter}"),
        };
        let hidden = match (&page.view, self.state.empty_pods, self.state.outbound) {
            (View::Pods, false, _) => "  only pods with flows",
            (View::Flows(_), _, true) => "  with those that it dialled",
            _ => "",
        };
        let line = format!("{}{filter}{hidden}", path.join(" > "));
        let line = elided(&line, area.width.into());
        frame.render_widget(Line::styled(line, self.theme.style(Tone::Faint)), area);
    }

    /// The names of the columns, and those rows that are visible. Only these become cells.
    fn list<T, const N: usize>(
        &self,
        frame: &mut Frame<'_>,
        header: Rect,
        body: Rect,
        columns: &[Column; N],
        rows: &[T],
        cells: impl Fn(&T) -> [Cell; N],
    ) {
        let page = self.state.page();
        let visible = rows.iter().skip(page.top).take(body.height.into());
        let visible: Vec<_> = visible.map(cells).collect();
        let sorted_by = sort_columns(&page.view).get(page.sort).copied();
        let titles = columns.map(|column| {
            let tone = match sorted_by == Some(column.title) {
                true => Tone::Draining,
                false => Tone::Strong,
            };
            Cell::new(column.title, tone)
        });
        let widths = widths(columns, &visible, body.width.into());
        let space = " ".repeat(gap(body.width.into()));
        let reversed = Style::new().add_modifier(Modifier::REVERSED);
        let mark = match page.reversed {
            true => Modifier::UNDERLINED | Modifier::ITALIC,
            false => Modifier::UNDERLINED,
        };
        let mut head = self.line(columns, &titles, &widths, &space);
        for (span, column) in head.spans.iter_mut().zip(columns) {
            if sorted_by == Some(column.title) {
                span.style = span.style.add_modifier(mark);
            }
        }
        frame.render_widget(head, header);
        for (i, (row, area)) in visible.iter().zip(body.rows()).enumerate() {
            let mut line = self.line(columns, row, &widths, &space);
            if page.top + i == page.index {
                // Colours would make a patchwork of it.
                line.spans.iter_mut().for_each(|span| span.style = reversed);
                frame.buffer_mut().set_style(area, reversed);
            }
            frame.render_widget(line, area);
        }
        if rows.is_empty() {
            frame.render_widget(self.why_empty(), body);
        }
    }

    fn line<'a, const N: usize>(
        &self,
        columns: &[Column; N],
        row: &'a [Cell; N],
        widths: &[usize; N],
        space: &str,
    ) -> Line<'a> {
        let cells = columns.iter().zip(row).zip(widths);
        let cells = cells.map(|((column, cell), width)| {
            let width = *width;
            let text = match column.fit {
                Fit::Number => format!("{:>width$}", cell.text),
                Fit::Word => format!("{:<width$}", cell.text),
                Fit::Name => format!("{:<width$}", elided(&cell.text, width)),
                Fit::Rest if width == 0 => String::new(),
                Fit::Rest => shortened(cell.text.clone(), width),
            };
            Span::styled(text + space, self.theme.style(cell.tone))
        });
        cells.collect()
    }

    /// What to say instead of rows.
    fn why_empty(&self) -> String {
        let page = self.state.page();
        if !page.filter.is_empty() {
            return "Nothing matches the filter. Esc clears it.".into();
        }
        match &page.view {
            View::Pods if self.state.empty_pods => "No pod runs on this node.".into(),
            View::Pods => "No pod has connections. Press e for the others.".into(),
            View::Drains => "No drain is known.".into(),
            View::Flows(pod) => {
                let list = self.answers.flows_of(&pod.uid);
                match list.and_then(|list| list.untracked.first()) {
                    Some(untracked) => format!("Its flows can't be seen: {}", untracked.why),
                    None if self.state.outbound => "No connection.".into(),
                    None => "No inbound connection. Press o for those that it dialled.".into(),
                }
            }
            View::FlowDetails(..) | View::DrainReport(..) => String::new(),
        }
    }

    /// The main keys, and where on the page the screen is.
    fn keys(&self, frame: &mut Frame<'_>, area: Rect) {
        let keys = match (self.state.typing, &self.state.page().view) {
            (true, _) => "Enter keep the filter  Esc clear it",
            (_, View::Pods) => {
                "Enter open  / filter  s sort  e empty pods  d drain  D drains  ? help  q quit"
            }
            (_, View::Drains) => "Enter open  Esc back  / filter  s sort  ? help  q quit",
            (_, View::Flows(_)) => {
                "Enter open  Esc back  / filter  s sort  o dialled  d drain  ? help  q quit"
            }
            (_, View::FlowDetails(..)) => "Enter drain  Esc back  ? help  q quit",
            (_, View::DrainReport(..)) => "Esc back  ? help  q quit",
        };
        let faint = self.theme.style(Tone::Faint);
        frame.render_widget(Line::styled(keys, faint), area);
    }

    /// How many rows follow below the screen.
    fn more(&self, frame: &mut Frame<'_>, area: Rect) {
        let last = self.state.page().top + visible_rows(frame.area().height);
        let more = self.rows.len().saturating_sub(last);
        if more > 0 {
            let more = Line::from(format!(" {more} more")).right_aligned();
            frame.render_widget(more, area);
        }
    }
}

/// The keys, over the middle of the page.
fn help(frame: &mut Frame<'_>) {
    let area = frame.area();
    let lines = KEYS.lines().count() as u16 + 2;
    let columns = KEYS.lines().map(|line| line.chars().count()).max();
    let columns = columns.unwrap_or_default() as u16 + 4;
    let area = area.centered(Constraint::Length(columns), Constraint::Length(lines));
    let block = Block::bordered().title(" any key closes this ");
    frame.render_widget(Clear, area);
    frame.render_widget(Paragraph::new(KEYS).block(block), area);
}

#[cfg(test)]
mod tests {
    use ratatui::{
        Terminal,
        backend::TestBackend,
        buffer::Buffer,
        crossterm::event::{KeyCode, KeyEvent, KeyModifiers},
    };

    use super::{super::testing::answers, *};

    /// Presses these keys, and draws.
    fn screen(answers: &Answers, keys: &[KeyCode], size: (u16, u16), theme: Theme) -> Buffer {
        let mut state = TopState::new();
        let height = visible_rows(size.1);
        state.settle(&answers.rows(&state, size.0.into()), height);
        for key in keys {
            let key = KeyEvent::new(*key, KeyModifiers::NONE);
            state.press(key, &answers.rows(&state, size.0.into()), height);
            state.settle(&answers.rows(&state, size.0.into()), height);
        }
        let picture = Picture {
            state: &state,
            answers,
            rows: &answers.rows(&state, size.0.into()),
            at: "03:04:05Z",
            problem: None,
            theme,
        };
        let mut terminal = Terminal::new(TestBackend::new(size.0, size.1)).unwrap();
        terminal.draw(|frame| picture.draw(frame)).unwrap();
        terminal.backend().buffer().clone()
    }

    fn text(buffer: &Buffer) -> Vec<String> {
        let rows = buffer.content.chunks(buffer.area.width.into());
        rows.map(|row| row.iter().map(|cell| cell.symbol()).collect::<String>())
            .map(|line| line.trim_end().to_owned())
            .collect()
    }

    const COLOURS: Theme = Theme { colours: true };

    #[test]
    fn at_80_by_24_all_numbers_are_shown_and_long_names_lose_their_middle() {
        let mut answers = answers(0);
        let long = "checkout-frontend-canary-7f9c5d8b6d-abcde";
        answers.pods.as_mut().unwrap().pods[2].pod.name = long.into();
        let lines = text(&screen(&answers, &[], (80, 24), COLOURS));
        assert_eq!(
            lines[..7],
            [
                "ebb top  4 pods (1 untracked), 1 draining, 42 live and 8 idle flows    03:04:05Z",
                "node",
                "NAMESPACE NAME                    LIVE  IDLE NEW/S PEERS  OLDEST DRAIN      LEFT",
                "shop      checkout-f…d8b6d-abcde     0     1   1.5     1   1m01s settling  16.8s",
                "shop      web                       40     0     -     1   1m01s -             -",
                "shop      api                        2     7    10     1   1m01s -             -",
                "shop      cache                      ?     ?     ?     ?       ? -             -",
            ]
        );
    }

    #[test]
    fn a_peer_has_its_name_in_the_list_on_its_page_and_in_the_filter() {
        let mut answers = answers(3);
        let list = &mut answers.flows.as_mut().unwrap().1;
        list.flows[1].peer = Some("shop/client-0".into());
        let open = [KeyCode::Down, KeyCode::Enter];
        let lines = text(&screen(&answers, &open, (80, 24), COLOURS));
        assert_eq!(
            lines[2..6],
            [
                "STATE    PEER          PEER NAME      PORT    AGE  QUIET   IN  OUT HOLDS",
                "active   10.1.0.0:1024 -              8080  1m40s   56ms   48 6.5M yes",
                "active   10.1.0.1:1025 shop/client-0  8080  1m39s   56ms   48 6.5M yes",
                "active   10.1.0.2:1026 -              8080  1m39s   56ms   48 6.5M yes",
            ]
        );
        let filter = [
            &open[..],
            &"/client".chars().map(KeyCode::Char).collect::<Vec<_>>(),
        ]
        .concat();
        let found = text(&screen(&answers, &filter, (80, 24), COLOURS)).join("\n");
        assert!(
            found.contains("shop/client-0") && !found.contains("10.1.0.0:"),
            "{found}"
        );
        let page = [&open[..], &[KeyCode::Down, KeyCode::Enter]].concat();
        let page = text(&screen(&answers, &page, (80, 24), COLOURS)).join("\n");
        assert!(page.contains("10.1.0.1:1025 (shop/client-0)"), "{page}");
    }

    #[test]
    fn only_visible_rows_are_drawn_of_50000() {
        let answers = answers(50_000);
        let keys = [KeyCode::Down, KeyCode::Enter, KeyCode::End];
        let started = std::time::Instant::now();
        let lines = text(&screen(&answers, &keys, (100, 30), COLOURS));
        assert!(
            lines[0].contains("50000 flows, 50000 live and 0 idle"),
            "{lines:?}"
        );
        assert!(lines[28].contains("10.1.195.79:"), "{lines:?}");
        assert!(started.elapsed().as_secs() < 5, "{:?}", started.elapsed());
    }

    #[test]
    fn without_colours_no_cell_has_one() {
        let has_colour = |theme| {
            let buffer = screen(&answers(0), &[], (100, 30), theme);
            let mut cells = buffer.content.iter();
            cells.any(|cell| cell.fg != Color::Reset || cell.bg != Color::Reset)
        };
        assert!(has_colour(COLOURS));
        assert!(!has_colour(Theme { colours: false }));
    }

    #[test]
    fn any_size_can_be_drawn() {
        let answers = answers(40);
        let down = [KeyCode::Down, KeyCode::Enter, KeyCode::Char('?')];
        for size in [(1, 1), (2, 4), (5, 3), (20, 6), (300, 100)] {
            for keys in 0..=down.len() {
                screen(&answers, &down[..keys], size, COLOURS);
            }
        }
    }

    #[test]
    fn the_help_lists_all_keys() {
        let lines = text(&screen(
            &answers(0),
            &[KeyCode::Char('?')],
            (80, 24),
            COLOURS,
        ));
        let all = lines.join("\n");
        for line in KEYS.lines() {
            assert!(all.contains(line.trim_end()), "{line}: {all}");
        }
    }
}
