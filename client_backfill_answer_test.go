package main

// Tests of decoding answers of the query API: what is read from an answer, which faults mean that the
// source has no query API, and which ones may end by themselves.

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
)

// decodedAnswer returns the series of an answer, one per line, and the error of decodeAPIAnswer.
func decodedAnswer(body io.Reader) (text string, err error) {
	err = decodeAPIAnswer(body, func(s *apiSeries) error {
		for _, name := range slices.Sorted(maps.Keys(s.Labels)) {
			text += fmt.Sprintf("%s=%q ", name, s.Labels[name])
		}
		for _, v := range s.Values {
			text += fmt.Sprintf("%v@%d ", v.V, v.T)
		}
		if s.Value != nil {
			text += fmt.Sprintf("one %v@%d ", s.Value.V, s.Value.T)
		}
		text = strings.TrimSuffix(text, " ") + "\n"
		return nil
	})
	return text, err
}

const (
	answerHead = `{"status":"success","data":{"resultType":"matrix","result":[`
	answerTail = `]}}`
	oneSeries  = `{"metric":{"__name__":"up"},"values":[[1,"1"]]}`
	oneDecoded = "__name__=\"up\" 1@1000\n"
)

// An answer of the query API has the series of an instant selector or of a range selector, with times in
// ms. The order of the fields and unknown fields do not matter.
func TestDecodeAPIAnswer(t *testing.T) {
	series := func(values string) string { return answerHead + `{"metric":{},"values":[` + values + `]}` + answerTail }
	for name, tt := range map[string]struct{ body, want string }{
		"vector":           {`{"status":"success","data":{"resultType":"vector","result":[{"metric":{"__name__":"up","job":"a\n\"é"},"value":[1700000000.123,"1"]}]}}`, "__name__=\"up\" job=\"a\\n\\\"é\" one 1@1700000000123\n"},
		"matrix":           {answerHead + oneSeries + `,{"metric":{"a":""},"values":[[0,"-0"],[1.001,"1.5"]]}` + answerTail, oneDecoded + "a=\"\" -0@0 1.5@1001\n"},
		"special values":   {series(`[1,"NaN"],[2,"+Inf"],[3,"-Inf"],[4,"1e300"],[5,"5e-324"]`), "NaN@1000 +Inf@2000 -Inf@3000 1e+300@4000 5e-324@5000\n"},
		"times":            {series(`[1700000000,"1"],[1700000000.001,"1"],[1700000000.999,"1"],[1.7e9,"1"],[-1.5,"1"],[0.0004,"1"]`), "1@1700000000000 1@1700000000001 1@1700000000999 1@1700000000000 1@-1500 1@0\n"},
		"latest time":      {series(fmt.Sprintf(`[%d,"1"],[-%d,"1"]`, int64(MaxMoment/1000), int64(MaxMoment/1000))), fmt.Sprintf("1@%d 1@-%[1]d\n", int64(MaxMoment/1000)*1000)},
		"native histogram": {answerHead + `{"metric":{"a":"h"},"histograms":[[1,{"count":"1","buckets":[[0,"1","2","1"]]}]]},` + oneSeries + answerTail, "a=\"h\"\n" + oneDecoded},
		"histogram vector": {`{"status":"success","data":{"result":[{"metric":{"a":"h"},"histogram":[1,{"count":"1"}]}]}}`, "a=\"h\"\n"},
		"data first":       {`{"data":{"result":[` + oneSeries + `],"resultType":"matrix"},"status":"success"}`, oneDecoded},
		"unknown fields":   {`{"x":[{"y":null}],"status":"success","data":{"stats":{"result":[1]},"result":[{"z":[1],"values":[[1,"1"]],"metric":{"__name__":"up"}}],"w":1},"v":"u"}`, oneDecoded},
		"warnings, infos":  {`{"status":"success","warnings":["a"],"infos":["b"],"data":{"result":[` + oneSeries + `]}}`, oneDecoded},
		"white space":      {"\n" + strings.ReplaceAll(answerHead+oneSeries+answerTail, ":", " :\n\t") + "\r\n ", oneDecoded},
		"no series":        {answerHead + answerTail, ""},
		"null result":      {`{"status":"success","data":{"resultType":"matrix","result":null}}`, ""},
		"null values":      {answerHead + `{"metric":{"a":"b"},"values":null,"value":null}` + answerTail, "a=\"b\"\n"},
	} {
		// The reader with single bytes finds what depends on the boundaries of reads.
		for _, body := range []io.Reader{strings.NewReader(tt.body), iotest.OneByteReader(strings.NewReader(tt.body)), iotest.DataErrReader(strings.NewReader(tt.body))} {
			if got, err := decodedAnswer(body); err != nil || got != tt.want {
				t.Errorf("%s: %s is decoded as %q, %v; want %q", name, tt.body, got, err, tt.want)
			}
		}
	}
}

// A body that is no JSON, or JSON of another shape, is not an answer of the query API.
func TestDecodeNoAPIAnswer(t *testing.T) {
	series := func(text string) string { return answerHead + text + answerTail }
	for _, body := range []string{
		"<html><title>Log in</title></html>", "up 1\n", "OK", "nil", "null", "1", `"success"`, "[]", "{}", `{"a"` + ":1}", `{1:2}`, `{"status" "success"}`,
		`{"status":"success"}`, `{"status":"success","data":null}`, `{"status":"success","data":{}}`, `{"status":"success","data":[]}`, `{"status":"success","data":"x"}`,
		`{"status":"success","data":{"result":{}}}`, `{"status":"success","data":{"result":"x"}}`, `{"status":"success","data":{"resultType":"scalar","result":[1,"1"]}}`,
		`{"data":{"result":[]}}`, `{"status":"","data":{"result":[]}}`, `{"status":"ok","data":{"result":[]}}`, `{"status":null,"data":{"result":[]}}`, `{"status":1,"data":{"result":[]}}`,
		`{"status":"error","error":[]}`, `{"status":"error","errorType":{}}`,
		series("1"), series("[]"), series("null"), series(`{}`), series(`{"metric":null}`), series(`{"metric":[]}`), series(`{"metric":{"a":1}}`), series(`{"values":[]}`),
		series(`{"metric":{},"values":{}}`), series(`{"metric":{},"values":[1]}`), series(`{"metric":{},"values":[null]}`), series(`{"metric":{},"values":[[]]}`), series(`{"metric":{},"values":[[1]]}`),
		series(`{"metric":{},"values":[[1,"1",2]]}`), series(`{"metric":{},"values":[[1,1]]}`), series(`{"metric":{},"values":[["1","1"]]}`), series(`{"metric":{},"values":[[null,"1"]]}`),
		series(`{"metric":{},"values":[[1,null]]}`), series(`{"metric":{},"values":[[1,""]]}`), series(`{"metric":{},"values":[[1,"x"]]}`), series(`{"metric":{},"values":[[1,"1e999"]]}`),
		series(`{"metric":{},"values":[[1e300,"1"]]}`), series(`{"metric":{},"values":[[1e999,"1"]]}`), series(`{"metric":{},"values":[[-1e300,"1"]]}`), series(fmt.Sprintf(`{"metric":{},"values":[[%d,"1"]]}`, int64(MaxMoment/1000)+1)),
		series(`{"metric":{},"value":[]}`), series(`{"metric":{},"value":1}`), series(`{"metric":{},"value":[[1,"1"]]}`),
		answerHead + oneSeries + `}}`, answerHead + oneSeries + `]]}`, answerHead + oneSeries + " " + oneSeries + answerTail,
		series("") + "x", series("") + "{}", series("") + "}", strings.Repeat("[", 1<<20), `{"a":` + strings.Repeat("[", 1<<20),
	} {
		_, err := decodedAnswer(strings.NewReader(body))
		if !errors.Is(err, errNoAPIAnswer) || len(err.Error()) > 400 {
			t.Errorf("%.200s: got the error %v, want a short one that says that this is no answer of the query API", body, err)
		}
	}
}

// An answer that ends early, or that cannot be read, is no proof that the source has no query API.
func TestDecodeCutAPIAnswer(t *testing.T) {
	whole := answerHead + oneSeries + "," + oneSeries + `],"x":[null,true]},"warnings":["a"]}`
	broken := errors.New("broken connection")
	for i := range whole {
		for want, body := range map[error]io.Reader{
			io.ErrUnexpectedEOF: strings.NewReader(whole[:i]),
			broken:              io.MultiReader(strings.NewReader(whole[:i]), iotest.ErrReader(broken)),
		} {
			text, err := decodedAnswer(body)
			if !errors.Is(err, want) || errors.Is(err, errNoAPIAnswer) || !strings.HasPrefix(oneDecoded+oneDecoded, text) {
				t.Errorf("after %q: got %q and the error %v, want %v", whole[:i], text, err, want)
			}
		}
	}
	// A checksum that is wrong is found after the last byte.
	if _, err := decodedAnswer(io.MultiReader(strings.NewReader(whole), iotest.ErrReader(broken))); !errors.Is(err, broken) {
		t.Errorf("if the body fails at its end, the error is %v, want %v", err, broken)
	}
}

// An answer that reports an error gives an apiError with a text that is not too long for a log.
func TestDecodeAPIError(t *testing.T) {
	long := strings.Repeat("x", 10_000)
	for body, want := range map[string]string{
		`{"status":"error","errorType":"bad_data","error":"parse error"}`:                      "bad_data: parse error",
		`{"error":"b","errorType":"a","data":null,"status":"error"}`:                           "a: b",
		`{"status":"error","errorType":"a","error":"b","data":{"result":[` + oneSeries + `]}}`: "a: b",
		`{"status":"error"}`: ": ",
		`{"status":"error","errorType":"` + long + `","error":"` + long + `"}`: long[:40] + ": " + long[:300],
	} {
		_, err := decodedAnswer(strings.NewReader(body))
		if got := new(apiError); !errors.As(err, &got) || errors.Is(err, errNoAPIAnswer) || err.Error() != want {
			t.Errorf("%.100s: got the error %v, want the apiError %q", body, err, want)
		}
	}
}

// An error of emit ends the decoding and is returned as it is.
func TestDecodeAPIAnswerStops(t *testing.T) {
	stop, n := errors.New("stop"), 0
	err := decodeAPIAnswer(strings.NewReader(answerHead+oneSeries+","+oneSeries+", <garbage>"), func(*apiSeries) error { n++; return stop })
	if err != stop || n != 1 {
		t.Errorf("after %d series, decodeAPIAnswer returned %v; want %v after 1", n, err, stop)
	}
}

// The limit on the body bounds the memory, even if the answer is one endless series. Without such a
// series, memory does not grow with the answer.
func TestDecodeAPIAnswerMemory(t *testing.T) {
	const limit = 1 << 20
	for name, tt := range map[string]struct {
		head, more string
		most       uint64 // bytes allocated per byte of the body
	}{
		"values":        {answerHead + `{"metric":{},"values":[[1,"1"]`, `,[1,"1"]`, 64},
		"histograms":    {answerHead + `{"metric":{},"histograms":[0`, `,0`, 16},
		"labels":        {answerHead + `{"metric":{"a":""`, `,"a":""`, 64},
		"unknown field": {`{"x":[0`, ",0", 16},
		"string":        {answerHead + `{"metric":{"`, "x", 16},
		"white space":   {answerHead, " ", 16},
	} {
		body := io.MultiReader(strings.NewReader(tt.head), &repeatingReader{text: tt.more})
		var err error
		used := allocated(func() { _, err = decodedAnswer(&sourceBody{r: body, limit: limit}) })
		if !errors.Is(err, errAnswerTooLarge) || errors.Is(err, errNoAPIAnswer) {
			t.Errorf("%s: got the error %v, want that the answer is too large", name, err)
		}
		if used > limit*tt.most {
			t.Errorf("%s: %d bytes were allocated for a body of %d bytes", name, used, limit)
		}
	}
	body := io.MultiReader(strings.NewReader(answerHead+oneSeries), &repeatingReader{text: "," + oneSeries, left: 4 * limit}, strings.NewReader(answerTail))
	largest := 0
	err := decodeAPIAnswer(&sourceBody{r: readSizes{body, &largest}, limit: 5 * limit}, func(*apiSeries) error { return nil })
	if err != nil || largest > 4096 {
		t.Errorf("decoding an answer of many small series: %v; the buffer grew to %d bytes", err, largest)
	}
}

// repeatingReader repeats a text until left bytes were read, rounded up to a whole text, or without end
// if left is 0.
type repeatingReader struct {
	text    string
	left, n int // n bytes were read
}

func (r *repeatingReader) Read(p []byte) (n int, err error) {
	for ; n < len(p); n++ {
		if r.left > 0 && r.n >= r.left && r.n%len(r.text) == 0 {
			return n, io.EOF
		}
		p[n] = r.text[r.n%len(r.text)]
		r.n++
	}
	return n, nil
}

// readSizes sets largest to the size of the largest buffer that was passed to Read.
type readSizes struct {
	r       io.Reader
	largest *int
}

func (r readSizes) Read(p []byte) (int, error) {
	*r.largest = max(*r.largest, len(p))
	return r.r.Read(p)
}

// Any body costs memory in proportion to its size. Its times are within their limits, and it gives the
// same series and the same error in whatever pieces it arrives. An answer that is accepted is an object,
// and is accepted only as a whole.
func FuzzDecodeAPIAnswer(f *testing.F) {
	for _, s := range []string{
		answerHead + oneSeries + answerTail, `{"status":"success","data":{"result":[{"metric":{"a":"b"},"value":[1.5,"NaN"]}]}}`, answerHead + `{"metric":{},"histograms":[[1,{}]]}` + answerTail,
		`{"status":"error","errorType":"a","error":"b"}`, `{"data":{"result":null},"x":[{}],"status":"success"}`, "<html>", "",
	} {
		f.Add([]byte(s))
	}
	decode := func(body io.Reader) (all []apiSeries, message string) {
		err := decodeAPIAnswer(body, func(s *apiSeries) error { all = append(all, *s); return nil })
		return all, fmt.Sprint(err)
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		var all []apiSeries
		var message string
		if used := allocated(func() { all, message = decode(strings.NewReader(string(body))) }); used > uint64(64<<10+128*len(body)) {
			t.Fatalf("%d bytes allocated for a body of %d bytes", used, len(body))
		}
		if len(message) > 4000 {
			t.Fatalf("the error has %d bytes, want at most 4,000", len(message))
		}
		for _, s := range all {
			for _, v := range append(s.Values, valuesOf(s.Value)...) {
				if s.Labels == nil || max(v.T, -v.T) > MaxMoment {
					t.Fatalf("series %v has a sample at %d", s.Labels, v.T)
				}
			}
		}
		again, message2 := decode(iotest.OneByteReader(strings.NewReader(string(body))))
		if !reflect.DeepEqual(withoutNaN(all), withoutNaN(again)) || message != message2 {
			t.Fatalf("got %v, %s\nin single bytes %v, %s", all, message, again, message2)
		}
		trimmed := strings.TrimRight(string(body), " \t\r\n")
		if message == "<nil>" {
			if _, message := decode(strings.NewReader(trimmed[:len(trimmed)-1])); message == "<nil>" {
				t.Fatal("the body is accepted without its last byte too")
			}
		}
	})
}

// valuesOf returns a list of the sample, or nil if there is none.
func valuesOf(s *apiSample) []apiSample {
	if s == nil {
		return nil
	}
	return []apiSample{*s}
}

// withoutNaN replaces the values that are NaN, which is equal to nothing, and returns the series.
func withoutNaN(all []apiSeries) []apiSeries {
	for _, s := range all {
		if s.Value != nil && math.IsNaN(s.Value.V) {
			s.Value.V = 1.25
		}
		for i := range s.Values {
			if math.IsNaN(s.Values[i].V) {
				s.Values[i].V = 1.25
			}
		}
	}
	return all
}

// One value is limited, so that memory is bounded although the answer as a whole may be large. A partial
// answer is a failure, because a gap would stay open.
func TestDecodeAPIAnswerLimits(t *testing.T) {
	body := io.MultiReader(strings.NewReader(`{"x":"`), &repeatingReader{text: "x"})
	if _, err := decodedAnswer(body); !errors.Is(err, errAnswerTooLarge) || !strings.Contains(err.Error(), "a value has more than 33554432 bytes") {
		t.Errorf("an endless value: got the error %v, want that it is too large", err)
	}
	for _, body := range []string{`{"isPartial":true,` + answerHead[1:] + answerTail, answerHead + oneSeries + `]},"isPartial":true}`} {
		if _, err := decodedAnswer(strings.NewReader(body)); err == nil || errors.Is(err, errNoAPIAnswer) || !strings.Contains(err.Error(), "partial") {
			t.Errorf("%s: got the error %v, want that the answer is partial", body, err)
		}
	}
	if _, err := decodedAnswer(strings.NewReader(`{"isPartial":false,` + answerHead[1:] + answerTail)); err != nil {
		t.Errorf("an answer that is not partial: %v", err)
	}
}
