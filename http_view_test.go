package main

// Tests of what a view computes: numbers, sizes and time spans as text, lists that are cut, and the
// heights of a plot.

import (
	"math"
	"slices"
	"testing"
	"time"
)

func TestFormatAge(t *testing.T) {
	const day = 24 * time.Hour
	for _, tt := range []struct {
		d    time.Duration
		want string
	}{
		{math.MinInt64, "0s"}, {-time.Hour, "0s"}, {0, "0s"}, {999 * time.Millisecond, "0s"}, {4 * time.Second, "4s"},
		{time.Minute - 1, "59s"}, {time.Minute, "1m"}, {150 * time.Second, "2m30s"},
		{time.Hour - 1, "59m59s"}, {time.Hour, "1h"}, {time.Hour + 59*time.Second, "1h"}, {3*time.Hour + 5*time.Minute, "3h5m"},
		{day - 1, "23h59m"}, {day, "1d"}, {12*day + 4*time.Hour, "12d4h"}, {1000*day - 1, "999d23h"}, {math.MaxInt64, "106751d23h"},
	} {
		if got := FormatAge(tt.d); got != tt.want {
			t.Errorf("FormatAge(%v) = %q, want %q", tt.d, got, tt.want)
		}
	}
}

// formatTest is a number, and the text that a function must return for it.
type formatTest struct {
	v    float64
	want string
}

func checkFormat(t *testing.T, format func(float64) string, tests []formatTest) {
	t.Helper()
	for _, tt := range tests {
		if got := format(tt.v); got != tt.want {
			t.Errorf("%v: got %q, want %q", tt.v, got, tt.want)
		}
	}
}

func TestFormatCount(t *testing.T) {
	checkFormat(t, FormatCount, []formatTest{
		{0, "0"}, {math.Copysign(0, -1), "0"}, {1, "1"}, {999, "999"}, {1000, "1,000"}, {999_999, "999,999"}, {999_999.5, "1,000,000"}, {1_000_000, "1,000,000"},
		{0.5, "0.5"}, {0.25, "0.25"}, {1.25, "1.2"}, {9.96, "10"}, {12.5, "12"}, {99.4, "99"}, {99.7, "100"}, {100.4, "100"}, {999.6, "1,000"},
		{-0.5, "-0.5"}, {-7, "-7"}, {-99.7, "-100"}, {-999, "-999"}, {-1000, "-1,000"},
		{1e21, "1,000,000,000,000,000,000,000"}, {math.NaN(), "NaN"}, {math.Inf(1), "+Inf"}, {math.Inf(-1), "-Inf"},
	})
}

func TestFormatBytes(t *testing.T) {
	const kib, mib, gib, tib = 1 << 10, 1 << 20, 1 << 30, 1 << 40
	checkFormat(t, FormatBytes, []formatTest{
		{0, "0 B"}, {1, "1 B"}, {512, "512 B"}, {1023, "1023 B"}, {1023.9, "1.0 KiB"}, {kib, "1.0 KiB"}, {1.4 * mib, "1.4 MiB"},
		{9.94 * kib, "9.9 KiB"}, {9.96 * kib, "10 KiB"}, {1023 * kib, "1023 KiB"}, {1023.99 * kib, "1.0 MiB"}, {mib - 1, "1.0 MiB"},
		{23 * gib, "23 GiB"}, {gib - 1, "1.0 GiB"}, {tib - 1, "1.0 TiB"}, {2000 * tib, "2000 TiB"}, {-5, "-5 B"},
		{math.NaN(), "NaN B"}, {math.Inf(1), "+Inf TiB"},
	})
}

func TestFormatSeconds(t *testing.T) {
	checkFormat(t, FormatSeconds, []formatTest{
		{0, "0s"}, {0.0004, "0s"}, {0.0005, "1ms"}, {0.012, "12ms"}, {0.9999, "1s"}, {1.5, "1.5s"}, {90, "1m30s"}, {-0.25, "-250ms"},
	})
}

func TestListNames(t *testing.T) {
	for _, tt := range []struct {
		names []string
		limit int
		want  string
	}{
		{nil, 2, ""}, {[]string{"a"}, 2, "a"}, {[]string{"a", "b"}, 2, "a, b"}, {[]string{"a", "b", "c"}, 2, "a, b and 1 more"}, {[]string{"a", "b", "c"}, 1, "a and 2 more"},
	} {
		if got := ListNames(tt.names, tt.limit); got != tt.want {
			t.Errorf("ListNames(%q, %d) = %q, want %q", tt.names, tt.limit, got, tt.want)
		}
	}
}

// HighestFamilies orders by count, and families with equal counts by name.
func TestHighestFamilies(t *testing.T) {
	byName := map[string]int{"d": 1, "b": 5, "a": 5, "c": 9}
	all := []FamilyCount{{"c", 9}, {"a", 5}, {"b", 5}, {"d", 1}}
	for _, tt := range []struct{ limit, want, others int }{{0, 0, 4}, {2, 2, 2}, {3, 3, 1}, {4, 4, 0}, {5, 4, 0}} {
		if got, others := HighestFamilies(byName, tt.limit); !slices.Equal(got, all[:tt.want]) || others != tt.others {
			t.Errorf("limit %d: got %v and %d others, want %v and %d", tt.limit, got, others, all[:tt.want], tt.others)
		}
	}
	if got, others := HighestFamilies(nil, 3); len(got) != 0 || others != 0 {
		t.Errorf("without names: got %v and %d others", got, others)
	}
}

// The heights of a plot are from 0 to 1, whatever its values are.
func TestPlot(t *testing.T) {
	nan, inf := math.NaN(), math.Inf(1)
	for _, tt := range []struct {
		values          []float64
		seconds         bool
		heights         []float64
		latest, highest string
	}{
		{nil, false, []float64{}, "0", "0"},
		{nil, true, []float64{}, "0s", "0s"},
		{[]float64{0, 0}, false, []float64{0, 0}, "0", "0"},
		{[]float64{1000, 4000, 2000}, false, []float64{0.25, 1, 0.5}, "2,000", "4,000"},
		{[]float64{0.5, 0.25}, true, []float64{1, 0.5}, "250ms", "500ms"},
		{[]float64{-1, -2}, false, []float64{0, 0}, "0", "0"},
		{[]float64{2, nan, inf, -inf, -3}, false, []float64{1, 0, 0, 0, 0}, "0", "2"},
		{[]float64{nan, inf}, true, []float64{0, 0}, "0s", "0s"},
		{[]float64{math.MaxFloat64, math.SmallestNonzeroFloat64}, true, []float64{1, 0}, "0s", FormatSeconds(math.MaxFloat64)},
	} {
		p := Plot{Values: tt.values, IsSeconds: tt.seconds}
		if got := p.Heights(); !slices.Equal(got, tt.heights) {
			t.Errorf("%v: heights %v, want %v", tt.values, got, tt.heights)
		}
		if p.Latest() != tt.latest || p.Highest() != tt.highest {
			t.Errorf("%v: now %s, highest %s; want %s, %s", tt.values, p.Latest(), p.Highest(), tt.latest, tt.highest)
		}
	}
}
